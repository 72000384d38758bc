"""Greedy texts with speculation are plain decoding's, token for token, in fp32: the whole proof, and a sample of it.

The whole proof is 1,000 texts of 64 tokens for every number of drafts, for every kind of draft and of target; a text
may differ only where the two best logits lie no further apart than rounding (`fastgen.lossless`).
"""

import pytest

from fastgen.load import LoadedModel, load_model, random_model
from fastgen.lossless import own_prompts, prove
from fastgen.speculation import AUTO

COUNTS = (*range(1, 9), AUTO)
HERE = {"device": "cpu", "dtype": "fp32"}
PAIRS = {
    "embedded": (None, "stories-draft"),
    "same": (None, "stories"),
    "self": (None, "self:4"),
    "int8": (None, "int8"),
    "int4": (None, "int4"),
    "ngram": (None, "ngram"),
    "random": (None, "random"),
    "int8 target": ("int8", "stories-draft"),
    "int4 target": ("int4", "stories-draft"),
}


def draft_of(name: str, target: LoadedModel) -> LoadedModel | str:
    if name == "random":
        from dataclasses import replace

        random = random_model(target.config, target.placement, seed=1)
        return replace(random, tokenizer=target.tokenizer)
    if name in ("int8", "int4"):
        return load_model("stories", quant=name, **HERE)
    return load_model(name, **HERE) if name.startswith("stories") else name


def different(pair: str, texts: int, counts: tuple[int | str, ...]) -> int:
    """Return how many texts differ; every one must be explained."""
    quant, draft = PAIRS[pair]
    target = load_model("stories", quant=quant, **HERE)
    found = 0
    for proof in prove(target, draft_of(draft, target), own_prompts(target, texts), counts=counts):
        assert (proof.texts, proof.tokens) == (texts, 64 * texts)
        assert all(difference.explained for difference in proof.differences), proof
        found += len(proof.differences)
    return found


@pytest.mark.parametrize("pair", ["embedded", "ngram", "int4 target"])
def test_a_sample_of_texts_is_plain_decodings(pair: str) -> None:
    assert different(pair, 20, (5,)) == 0


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("pair", PAIRS)
def test_a_thousand_texts_are_plain_decodings_at_every_number_of_drafts(pair: str) -> None:
    assert different(pair, 1000, COUNTS) == 0
