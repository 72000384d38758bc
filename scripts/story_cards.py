"""The words of the embedded pair's model cards."""

ORIGIN = """\
Trained for fastgen by its own trainer, with `scripts/make_stories`, which remakes it.

**Data.** Only text that a model under the MIT licence wrote: {sample[stories]:,} distinct finished stories
({sample[bytes]:,} bytes, {tokenize[tokens]:,} tokens) sampled from
[stories15M](https://huggingface.co/karpathy/tinyllamas) (Andrej Karpathy, MIT; itself trained on TinyStories) at
temperature 1 with min-p 0.1. Half of them began from nothing, half from one of {openings} openings of a few words
("One rainy afternoon,", "A clever fox"), written by hand for this and listed in the script. The tokenizer,
SentencePiece BPE of {tokenize[vocabulary]:,} pieces, was learned from that text. No other text, weights or vocabulary
went into it. {draft[validation_tokens]:,} tokens from the end were held out.
"""

TARGET_CARD = (
    """\
---
license: bsd-3-clause
language: en
---
# stories

A LLaMA of {target[parameters]:,} parameters that tells little stories for children, in English; fastgen's default
model. It knows nothing else, and is there to show, test and measure an engine with real weights offline.

"""
    + ORIGIN
    + """
**Figures.** Held-out loss {target[last][loss]:.4f} nats per token after {target[last][step]:,} steps
({target[train_seconds]:.0f} s, {target[device]}), of the fp32 weights at the end of training. Of the bf16 weights that
are here: {held_out[target_loss]:.4f} on the last {held_out[tokens]:,} of these tokens.

**Samples**, greedy first, then at temperature 0.8:

{quoted}
"""
)

DRAFT_CARD = (
    """\
---
license: bsd-3-clause
language: en
---
# stories-draft

A LLaMA of {draft[parameters]:,} parameters with the vocabulary of `stories`, whose predictions it was trained to
follow (KL divergence on its logits): the draft for speculative decoding.

"""
    + ORIGIN
    + """
**Figures.** On held-out text its likeliest next token is that of `stories` at {draft[last][agreement]:.1%} of
positions; divergence {draft[last][divergence]:.4f} nats, loss {draft[last][loss]:.4f} nats per token, after
{draft[last][step]:,} steps ({draft[train_seconds]:.0f} s, {draft[device]}); its weights in fp32, as at the end of
training. Of the bf16 weights that are here: {held_out[agreement]:.1%}, {held_out[divergence]:.4f} and
{held_out[draft_loss]:.4f} on the last {held_out[tokens]:,} of these tokens.
"""
)

PAIR = {"stories": TARGET_CARD, "stories-draft": DRAFT_CARD}
"""The models of the embedded pair, and the cards that `make_stories` fills in."""
