"""A Hugging Face `config.json` read into a `ModelConfig`: llama, mistral, qwen2 and qwen3.

Both generations of keys are read: `rope_theta` beside `rope_scaling` (with `type` or `rope_type`), and the
`rope_parameters` of transformers 5. A key means what it means to transformers (5.23), since weights are published
against that code, and a key that the file leaves out has the default of its configuration class for the model type.

Nothing that changes the maths is passed over. Every key that is used is typed and bounded; any other whose name
smells of architecture is refused by name, unless it is null, false, zero or empty. That holds for keys which
transformers ignores, too (`attention_bias` of a mistral): such a file was written for another model than it names.

    config = read_hf_config(Path("model/config.json"))
"""

import re
import reprlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fastgen.checkpoint.fields import Fields
from fastgen.config import MAX_LAYERS, ModelConfig, RopeScaling
from fastgen.errors import ModelFileError
from fastgen.files import naming
from fastgen.json_file import read_json

SHARED_DEFAULTS: Mapping[str, object] = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rope_parameters": None,
    "partial_rotary_factor": None,
    "original_max_position_embeddings": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN_DEFAULTS: Mapping[str, object] = {
    **SHARED_DEFAULTS,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
DEFAULTS: Mapping[str, Mapping[str, object]] = {
    "llama": {
        **SHARED_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        **SHARED_DEFAULTS,
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": QWEN_DEFAULTS,
    "qwen3": {**QWEN_DEFAULTS, "head_dim": 128, "attention_bias": False},
}
"""The keys of each model type that are used, with transformers' defaults (`models/*/configuration_*.py`)."""

CLASSES = {f"{family}forcausallm": family for family in DEFAULTS}  # lower case: early files write LLaMAForCausalLM

ARCHITECTURAL = re.compile(
    "rope|rotary|alibi|norm|att(n|ention)|sink|bias|scal|multiplier|mup|residual|soft_?cap|clip|window|expert|router|moe"
    "|layer_types|per_layer"
)
# Dropout is for training, and how attention is computed is our own choice. `pretraining_tp`, which `ARCHITECTURAL`
# does not match, splits the same sums differently.
HARMLESS = re.compile("drop|flash_att|(attn|experts)_implementation|output_attentions")

# In a rope section everything is architectural but a remark of the authors and the parameters of the other kinds.
ROPE_PARAMETERS = frozenset(
    (
        "type",
        "finetuned",
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
        "low_freq_factor",
        "high_freq_factor",
    )
)


def read_hf_config(path: Path) -> ModelConfig:
    """Return the config in the `config.json` at `path`; stop tokens are those of a `generation_config.json` beside it.

    Raises `ModelFileError` for a file that is unreadable, not a JSON object, or not of a supported model.
    """
    config = config_from_hf(read_json(path), path)
    generation = path.with_name("generation_config.json")
    if not generation.exists():
        return config
    fields = Fields(read_json(generation))
    with naming(generation):
        stops = fields.token_ids("eos_token_id", config.vocab_size)
    return replace(config, eos_token_ids=stops) if stops else config


def config_from_hf(raw: Mapping[str, object], source: Path) -> ModelConfig:
    """Return the config in `raw`, the object of a `config.json`; `source` names that file in errors.

    Raises `ModelFileError` naming the field, its value and what was expected.
    """
    with naming(source):
        family = _family(raw)
        fields = Fields({**DEFAULTS[family], **raw})
        config = _config(family, fields)
        fields.refuse_unread(_is_harmless)
    return config


def _family(raw: Mapping[str, object]) -> str:
    kind, architectures = raw.get("model_type"), raw.get("architectures") or []
    supported = f"supported are {', '.join(DEFAULTS)}"
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise ModelFileError(f"architectures is {reprlib.repr(architectures)}, expected a list of class names")
    families = [CLASSES.get(name.lower()) for name in architectures]
    if kind is None:
        kind = next(iter(families), None)
    if not isinstance(kind, str) or kind not in DEFAULTS:
        named = architectures if raw.get("model_type") is None else raw["model_type"]
        raise ModelFileError(f"the model type {reprlib.repr(named)} is not supported; {supported}")
    if families and kind not in families:
        raise ModelFileError(
            f"architectures is {reprlib.repr(architectures)}, expected the causal language model of model_type {kind!r}"
        )
    return kind


def _is_harmless(name: str) -> bool:
    return not ARCHITECTURAL.search(name) or HARMLESS.search(name) is not None


def _config(family: str, fields: Fields) -> ModelConfig:
    known = DEFAULTS[family]
    if fields.get("hidden_act") not in ("silu", "swish"):
        raise fields.error("hidden_act", "'silu': no other activation is supported")
    dim, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.optional_integer("head_dim")
    if head_dim is None and dim % heads:
        raise fields.error("hidden_size", f"a multiple of num_attention_heads {heads}, or a head_dim")
    layers = fields.integer("num_hidden_layers", high=MAX_LAYERS)
    vocab_size = fields.integer("vocab_size")
    positions = fields.integer("max_position_embeddings")
    theta, scaling = _rope(fields, positions)
    if scaling and scaling.kind == "dynamic" and (head_dim or dim // heads) <= 2:
        raise fields.error("hidden_size", "heads wider than 2 for dynamic rope scaling")
    attention_bias = "attention_bias" in known and fields.boolean("attention_bias")
    bos = fields.token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        dim=dim,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=fields.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim or dim // heads,
        hidden_dim=fields.integer("intermediate_size"),
        vocab_size=vocab_size,
        max_seq_len=_context(positions, scaling),
        norm_eps=fields.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=fields.boolean("tie_word_embeddings"),
        qkv_bias=attention_bias or family == "qwen2",
        output_bias=attention_bias,
        mlp_bias="mlp_bias" in known and fields.boolean("mlp_bias"),
        qk_norm=family == "qwen3",
        windows=_windows(family, fields, layers),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


def _windows(family: str, fields: Fields, layers: int) -> tuple[int, ...]:
    """Return every layer's window; `layer_types` chooses among them in a qwen, elsewhere it may only agree."""
    window, first = 0, 0
    if "sliding_window" in DEFAULTS[family]:
        window = fields.optional_integer("sliding_window") or 0
    if "use_sliding_window" in DEFAULTS[family]:
        first = fields.integer("max_window_layers", low=0)
        window = window if fields.boolean("use_sliding_window") else 0
    usual = tuple(window if layer >= first else 0 for layer in range(layers))
    types = fields.get("layer_types")
    if types is None:
        return usual
    widths = {"full_attention": 0, "sliding_attention": window}
    if not isinstance(types, list) or len(types) != layers or not all(kind in list(widths) for kind in types):
        raise fields.error("layer_types", f"{layers} times 'full_attention' or 'sliding_attention'")
    if not window and "sliding_attention" in types:
        raise fields.error("layer_types", "full attention only, where use_sliding_window is off or there is no window")
    chosen = tuple(widths[kind] for kind in types)
    if "layer_types" not in DEFAULTS[family] and chosen != usual:
        raise fields.error("layer_types", f"sliding attention only: that is what a {family} with a window has")
    return chosen


def _context(positions: int, scaling: RopeScaling | None) -> int:
    """Return how many positions the model was made for.

    YaRN and dynamic NTK are often switched on in a file whose `max_position_embeddings` still is the original length.
    For linear scaling files disagree on whether it counts the factor already, so it is taken as it stands.
    """
    if scaling and scaling.kind in ("yarn", "dynamic"):
        return max(positions, int(scaling.original_max_seq_len * scaling.factor))
    return positions


def _rope(fields: Fields, positions: int) -> tuple[float, RopeScaling | None]:
    """Return RoPE's theta and scaling; a nonempty `rope_scaling` goes before `rope_parameters`, as in transformers."""
    if fields.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise fields.error("partial_rotary_factor", "1: rotating a part of every head is not supported")
    old, new = fields.section("rope_scaling"), fields.section("rope_parameters")
    rope = old or new or Fields({})
    theta = fields.number("rope_theta", above=1)
    if "rope_theta" in rope:
        theta = rope.number("rope_theta", above=1)
    scaling = _scaling(rope, fields.optional_integer("original_max_position_embeddings"), positions)
    if rope.optional_number("partial_rotary_factor") not in (None, 1.0):
        raise rope.error("partial_rotary_factor", "1: rotating a part of every head is not supported")
    rope.refuse_unread(ROPE_PARAMETERS.__contains__)
    return theta, scaling


def _scaling(rope: Fields, beside: int | None, positions: int) -> RopeScaling | None:
    """Return the scaling of a rope section; `beside` is the original length where it stands outside of it, and wins."""
    name = "rope_type" if "rope_type" in rope or "type" not in rope else "type"
    kind = rope.get(name) if name in rope else "default"
    if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
        raise rope.error(name, "'default', 'linear', 'dynamic', 'yarn' or 'llama3': no other scaling is supported")
    if kind == "default":
        return None
    within = rope.optional_integer("original_max_position_embeddings")
    original = positions if kind in ("linear", "dynamic") else beside or within or positions
    if kind == "yarn" and "factor" in rope and rope.get("factor") is None:
        factor = positions / original
    else:
        factor = rope.number("factor")
    if kind == "yarn":
        return RopeScaling(
            kind="yarn",
            factor=factor,
            original_max_seq_len=original,
            attention_factor=rope.optional_number("attention_factor"),
            beta_fast=rope.optional_number("beta_fast") or 32.0,
            beta_slow=rope.optional_number("beta_slow") or 1.0,
            mscale=rope.optional_number("mscale"),
            mscale_all_dim=rope.optional_number("mscale_all_dim"),
            truncate="truncate" not in rope or rope.boolean("truncate"),
        )
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=factor,
            original_max_seq_len=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    return RopeScaling(kind=str(kind), factor=factor, original_max_seq_len=original)
