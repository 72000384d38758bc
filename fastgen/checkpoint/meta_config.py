"""Meta's `params.json` read into a `ModelConfig`; what the file does not say, the tensors and the release do.

Fields: `ModelArgs` of https://github.com/meta-llama/llama-models (models/llama3/args.py) and of meta-llama/llama.
Fields that are not known here may change what the model computes, and are refused by name.
"""

from collections.abc import Mapping

from fastgen.checkpoint.fields import MAX_SIZE, Fields
from fastgen.checkpoint.lazy import LazyTensor
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import ModelFileError

EMBEDDING = "tok_embeddings.weight"
HEAD = "output.weight"
LLAMA3_THETA = 500_000.0
LLAMA3_CONTEXT = 8192  # of Llama 3, and the original context that the scaling of Llama 3.1 and later stretches
LONG_CONTEXT = 131_072
SMALL_DIM = 3072  # of the largest Llama 3.2 of text alone, whose frequencies are divided by up to 32 instead of 8


def config_from_params(fields: Fields, tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """Return the config of the model with these `tensors`, by Meta's names and merged.

    Raises `ModelFileError` for a field that is missing, out of its range or not known.
    """
    if EMBEDDING not in tensors:
        raise ModelFileError(f"the weights beside it have no {EMBEDDING}: they are no Llama's")
    dim, heads, layers = fields.integer("dim"), fields.integer("n_heads"), fields.integer("n_layers")
    if dim % heads:
        raise fields.error("dim", f"a multiple of n_heads {heads}")
    kv_heads, eps = fields.optional_integer("n_kv_heads"), fields.number("norm_eps")
    theta = fields.optional_number("rope_theta") or 10000.0
    scaling = _scaling(fields, dim)
    positions = fields.optional_integer("max_seq_len") or _context(theta, eps, heads, kv_heads, scaled=bool(scaling))
    config = ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads or heads,
        head_dim=dim // heads,
        hidden_dim=_hidden_dim(fields, dim),
        vocab_size=_vocab_size(fields, tensors[EMBEDDING]),
        max_seq_len=positions,
        norm_eps=eps,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=HEAD not in tensors,
    )
    fields.refuse_unread(lambda name: name == "max_batch_size")
    return config


def _hidden_dim(fields: Fields, dim: int) -> int:
    """Return the width of the feed-forward: two thirds of 4 D, times a factor, rounded up to a round number."""
    factor = fields.optional_number("ffn_dim_multiplier") or 1.0
    unit = fields.integer("multiple_of")
    width = int(8 * dim / 3) * factor
    if width > MAX_SIZE:
        raise fields.error("ffn_dim_multiplier", f"a factor that leaves a size up to {MAX_SIZE}")
    return -(-int(width) // unit) * unit


def _vocab_size(fields: Fields, embedding: LazyTensor) -> int:
    """Return the number of tokens: Llama 1 and 2 say -1, and leave it to the embedding."""
    size = fields.get("vocab_size")
    return embedding.shape[0] if size in (None, -1) else fields.integer("vocab_size")


def _scaling(fields: Fields, dim: int) -> RopeScaling | None:
    """Return the scaling of Llama 3.1 and later, whose factor the file need not give."""
    factor = fields.optional_number("rope_scaling_factor")
    if "use_scaled_rope" not in fields or not fields.boolean("use_scaled_rope"):
        return None
    default = 32.0 if dim <= SMALL_DIM else 8.0
    return RopeScaling(kind="llama3", factor=factor or default, original_max_seq_len=LLAMA3_CONTEXT)


def _context(theta: float, eps: float, heads: int, kv_heads: int | None, *, scaled: bool) -> int:
    """Return how many positions a release was made for, which no `params.json` of Meta's says."""
    if scaled:
        return LONG_CONTEXT
    if theta == LLAMA3_THETA:
        return LLAMA3_CONTEXT
    if theta > 10000:
        return 16384  # Code Llama
    is_llama1 = eps < 1e-5 or (heads == 64 and kv_heads is None)  # up to 33B, and 65B
    return 2048 if is_llama1 else 4096
