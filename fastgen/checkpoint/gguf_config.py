"""GGUF metadata to `ModelConfig`.

Fields: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md and the writer of nearly all such files,
llama.cpp's `convert_hf_to_gguf.py`. What the metadata do not say (biases, an output head, the scaling of Llama 3),
the tensors do. Fields of the architecture that are not known here may change what the model computes, and are
refused by name.
"""

import math
from collections.abc import Mapping

import torch

from fastgen.checkpoint.lazy import LazyTensor
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import ModelFileError
from fastgen.gguf_fields import GgufFields, Value

ARCHITECTURES = ("llama", "qwen2", "qwen3")

SIZES = {
    "dim": "embedding_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "hidden_dim": "feed_forward_length",
    "max_seq_len": "context_length",
}

# Fields that are without a bearing here, or are read only where they have one.
NEUTRAL = (
    "attention.causal",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
    "vocab_size",
)
MULTIPLIERS = ("rope.scale_linear", "rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor")

ROPE_FREQS = "rope_freqs.weight"
LLAMA3_CONTEXT = 8192  # the original context of Llama 3.1 to 3.3, which `rope_freqs` are made from


def config_from_gguf(metadata: Mapping[str, object], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """Return the config of a GGUF model, from its metadata and its tensors.

    Raises `ModelFileError` for what is missing, contradictory or not supported, by the field's name.
    """
    fields = _Fields(metadata)
    sizes = {name: fields.own(key, int) for name, key in SIZES.items()}
    layers, heads, context = sizes["n_layers"], sizes["n_heads"], sizes["max_seq_len"]
    if not 1 <= layers <= len(tensors) or heads < 1:
        raise ModelFileError(f"{layers} layers of {heads} heads in a file of {len(tensors)} tensors")
    head_dim = fields.own("attention.key_length", int, sizes["dim"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (size := fields.own(name, int, head_dim)) != head_dim:
            raise ModelFileError(
                f"metadata field {name!r} is {size}; other than the head size {head_dim} is unsupported"
            )
    vocab_size, theta = _vocab_size(fields), fields.own("rope.freq_base", float, 10000.0)
    window = fields.own("attention.sliding_window", int, 0)
    scaling, llama3_scaling = _rope_scaling(fields, context), _llama3_scaling(tensors, head_dim, theta)
    if scaling and llama3_scaling:
        raise ModelFileError(f"'rope.scaling.type' and tensor {ROPE_FREQS!r} ask for two scalings at once")
    config = ModelConfig(
        **sizes,
        n_kv_heads=fields.own("attention.head_count_kv", int, heads),
        head_dim=head_dim,
        vocab_size=vocab_size,
        norm_eps=fields.own("attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=scaling or llama3_scaling,
        tie_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm=fields.architecture == "qwen3",
        windows=(window,) * layers if 0 < window < context else (),
        bos_token_id=fields.token("bos", vocab_size),
        eos_token_ids=tuple(token for role in ("eos", "eot") if (token := fields.token(role, vocab_size)) is not None),
    )
    fields.refuse_unknown()
    return config


class _Fields(GgufFields):
    """The metadata of a model's architecture, by their names in it; notes what was asked for."""

    def __init__(self, metadata: Mapping[str, object]) -> None:
        super().__init__(metadata)
        self._known = set(NEUTRAL)
        self.architecture, kind = self.get("general.architecture", str, ""), self.get("general.type", str, "model")
        if self.architecture not in ARCHITECTURES or kind != "model":
            raise ModelFileError(
                f"a GGUF {kind:.60} of architecture {self.architecture[:60]!r} is not supported; "
                f"models of {', '.join(ARCHITECTURES)} are"
            )
        if self.get("split.count", int, 1) > 1:
            raise ModelFileError("is one of several parts; join them with llama.cpp's `llama-gguf-split --merge`")

    def own(self, name: str, kind: type[Value], default: Value | None = None) -> Value:
        """Return field `name` of the architecture, or `default` where there is none; without one it is required."""
        self._known.add(name)
        key = f"{self.architecture}.{name}"
        return self.required(key, kind) if default is None else self.get(key, kind, default)

    def refuse_unknown(self) -> None:
        """Raise for a field of the architecture that nobody asked for, unless it switches something off."""
        prefix = f"{self.architecture}."
        for key, value in self.metadata.items():
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._known and value:
                raise ModelFileError(f"metadata field {key!r} ({value!s:.40}) is not supported")


def _vocab_size(fields: _Fields) -> int:
    tokens = fields.metadata.get("tokenizer.ggml.tokens")
    return len(tokens) if isinstance(tokens, list) else fields.own("vocab_size", int)


def _rope_scaling(fields: _Fields, context: int) -> RopeScaling | None:
    for name in MULTIPLIERS:
        if (factor := fields.own(name, float, 1.0)) != 1:
            raise ModelFileError(f"metadata field {name!r} is {factor}; other than 1 is not supported")
    kind = fields.own("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise ModelFileError(f"metadata field 'rope.scaling.type' is {kind!r}; only linear and yarn are supported")
    return RopeScaling(
        kind=kind,
        factor=fields.own("rope.scaling.factor", float),
        original_max_seq_len=fields.own("rope.scaling.original_context_length", int, context),
        beta_fast=fields.own("rope.scaling.yarn_beta_fast", float, 32.0),
        beta_slow=fields.own("rope.scaling.yarn_beta_slow", float, 1.0),
    )


def _llama3_scaling(tensors: Mapping[str, LazyTensor], head_dim: int, theta: float) -> RopeScaling | None:
    """Return the scaling that `rope_freqs.weight` [d / 2], the divisors of all frequencies, was computed from."""
    if ROPE_FREQS not in tensors:
        return None
    if tensors[ROPE_FREQS].shape != (head_dim // 2,):
        raise ModelFileError(f"tensor {ROPE_FREQS!r} is {list(tensors[ROPE_FREQS].shape)}, expected [{head_dim // 2}]")
    factors = tensors[ROPE_FREQS][:].double()
    if bool((factors == 1).all()):
        return None
    largest = float(factors.max())
    if 1 <= largest < math.inf:
        scaling = RopeScaling(kind="llama3", factor=largest, original_max_seq_len=LLAMA3_CONTEXT)
        if torch.allclose(factors, _llama3_divisors(scaling, head_dim, theta), rtol=1e-5):
            return scaling
    raise ModelFileError(
        f"tensor {ROPE_FREQS!r} is not what Llama 3.1 to 3.3 have (original context {LLAMA3_CONTEXT}, frequency "
        "factors 1 and 4); other frequency factors are not supported"
    )


def _llama3_divisors(scaling: RopeScaling, head_dim: int, theta: float) -> torch.Tensor:
    """Return what llama3 scaling divides every frequency by, fp64 [d / 2]."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = scaling.original_max_seq_len * frequencies / (2 * math.pi)  # within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)  # the share that is left unscaled
    return 1 / (kept + (1 - kept) / scaling.factor)
