"""New models: a shape from a few words or a `config.json`, and the weights that training begins with."""

from dataclasses import replace

import torch

from fastgen.config import ModelConfig
from fastgen.errors import UsageError
from fastgen.kernels.causal import CausalStages
from fastgen.model import Transformer
from fastgen.shapes import shape

DEFAULT_SHAPE = "dim=256,layers=4,heads=8"
FIELDS = {
    "dim": "dim",
    "layers": "n_layers",
    "heads": "n_heads",
    "kv-heads": "n_kv_heads",
    "head-dim": "head_dim",
    "hidden": "hidden_dim",
    "vocab-size": "vocab_size",
    "tied": "tie_embeddings",
}
"""What a shape may name, and the field of `ModelConfig` that it sets."""

INIT_STD = 0.02  # GPT-2's, which Llama's descendants kept
HIDDEN_MULTIPLE = 32


def parse_shape(text: str, *, vocab_size: int | None, context: int) -> ModelConfig:
    """Return the config of a shape such as `dim=256,layers=5,heads=8,kv-heads=4,hidden=768`, or of a published one.

    A published shape (`fastgen.shapes`) takes the tokenizer's vocabulary, too. What is left out:
    as many key/value heads as heads, heads that fill the width, a hidden width of 8/3 dim rounded up to a multiple of
    32, tied embeddings (`tied=0` unties them), the tokenizer's vocabulary.

    Raises `UsageError` for a word that is no field or no number, and for a missing one.
    """
    if "=" not in text:
        published = shape(text)
        return replace(published, vocab_size=vocab_size or published.vocab_size, max_seq_len=context)
    given: dict[str, int] = {}
    for word in text.split(","):
        name, _, value = word.strip().replace("_", "-").partition("=")
        if name not in FIELDS or not value.isdecimal():
            raise UsageError(f"--shape {text}: {word!r} is not one of {', '.join(FIELDS)} with = and a number")
        given[FIELDS[name]] = int(value)
    missing = [name for name in ("dim", "n_layers", "n_heads") if not given.get(name)]
    if missing:
        raise UsageError(f"--shape {text}: {missing[0]} is missing or 0; --shape {DEFAULT_SHAPE} is the least")
    size = given.get("vocab_size", vocab_size)
    if size is None:
        raise UsageError(f"--shape {text}: without a tokenizer it needs the vocabulary, as in {text},vocab-size=50257")
    dim, heads = given["dim"], given["n_heads"]
    if "head_dim" not in given and dim % heads:
        raise UsageError(f"--shape {text}: dim {dim} is not a multiple of {heads} heads; change one, or give head-dim")
    return ModelConfig(
        dim=dim,
        n_layers=given["n_layers"],
        n_heads=heads,
        n_kv_heads=given.get("n_kv_heads", heads),
        head_dim=given.get("head_dim", dim // heads),
        hidden_dim=given.get("hidden_dim", -(-8 * dim // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE),
        vocab_size=size,
        max_seq_len=context,
        tie_embeddings=bool(given.get("tie_embeddings", 1)),
    )


def with_marks(config: ModelConfig, bos: int | None, eos: frozenset[int]) -> ModelConfig:
    """Return the config with a tokenizer's marks in place of its own."""
    return replace(config, bos_token_id=bos, eos_token_ids=tuple(sorted(eos)))


def new_model(config: ModelConfig, seed: int) -> Transformer:
    """Return a trainable model on the CPU with random fp32 weights that are a function of the seed.

    Normal with a standard deviation of 0.02; what adds to the residual stream begins smaller by the root of the
    number of additions (GPT-2, section 2.3). Norms are ones, biases zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Transformer(config, stages=CausalStages(config.n_kv_heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
            else:
                additions = 2 * config.n_layers if ".wo." in name or ".w_down." in name else 1
                parameter.normal_(0.0, INIT_STD * additions**-0.5, generator=generator)
    return model.requires_grad_(True)
