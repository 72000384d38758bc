"""Tensor names: from the schemes that files use to ours, with every tensor's shape checked on the way.

Ours are few and fused (letters: `fastgen.config`); a scheme says which foreign tensors make up each of them:

    embedding.weight [V, D]    norm.weight [D]    lm_head.weight [V, D], absent when the embeddings are tied
    layers.{i}. attention_norm.weight [D]    wqkv.weight [(H + 2K) d, D]    wo.weight [D, H d]
                ffn_norm.weight [D]          w_gate_up.weight [2F, D]       w_down.weight [D, F]
                q_norm.weight, k_norm.weight [d] (config.qk_norm)

A linear's `.bias` has its weight's rows. A quantized linear has, in place of `.weight`, the tensors that
`quantize.int8` or `quantize.int4` lists; what it has in a file, a `StoredLinear` says. `assemble` is the only way from
a file's tensors to a model's: what it returns fits the config, and everything that does not fit comes in one error.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastgen.checkpoint.integers import Leaves, StoredLinear, dequantized, in_memory
from fastgen.checkpoint.lazy import Concat, HalfSplit, LazyTensor
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from quantize.format import WeightFormat

Shape = tuple[int, ...]

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPE_LEAF = ".weight_shape"  # of a quantized weight; the config tells as much
SHOWN = 8  # names that an error lists before it only counts


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How one kind of file names its tensors.

    `model` and `layer` map our module names to theirs, in the order of their rows; `.weight` or `.bias` completes
    both. `interleaved` says that query and key rows stand in the order of interleaved RoPE.
    """

    model: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, tuple[str, ...]]
    interleaved: bool = False
    ignored: tuple[str, ...] = ()  # endings of tensors that carry no weights


HF = Scheme(
    model={"embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
    layer_prefix="model.layers.{}.",
    layer={
        "attention_norm": ("input_layernorm",),
        "wqkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "wo": ("self_attn.o_proj",),
        "ffn_norm": ("post_attention_layernorm",),
        "w_gate_up": ("mlp.gate_proj", "mlp.up_proj"),
        "w_down": ("mlp.down_proj",),
    },
    ignored=("rotary_emb.inv_freq",),
)

META = Scheme(
    model={"embedding": "tok_embeddings", "norm": "norm", "lm_head": "output"},
    layer_prefix="layers.{}.",
    layer={
        "attention_norm": ("attention_norm",),
        "wqkv": ("attention.wq", "attention.wk", "attention.wv"),
        "wo": ("attention.wo",),
        "ffn_norm": ("ffn_norm",),
        "w_gate_up": ("feed_forward.w1", "feed_forward.w3"),
        "w_down": ("feed_forward.w2",),
    },
    interleaved=True,
    ignored=("rope.freqs",),
)

GGUF_NEOX = Scheme(
    model={"embedding": "token_embd", "norm": "output_norm", "lm_head": "output"},
    layer_prefix="blk.{}.",
    layer={
        "attention_norm": ("attn_norm",),
        "wqkv": ("attn_q", "attn_k", "attn_v"),
        "q_norm": ("attn_q_norm",),
        "k_norm": ("attn_k_norm",),
        "wo": ("attn_output",),
        "ffn_norm": ("ffn_norm",),
        "w_gate_up": ("ffn_gate", "ffn_up"),
        "w_down": ("ffn_down",),
    },
)

GGUF_LLAMA = Scheme(model=GGUF_NEOX.model, layer_prefix=GGUF_NEOX.layer_prefix, layer=GGUF_NEOX.layer, interleaved=True)


def assemble(
    config: ModelConfig,
    foreign: Mapping[str, LazyTensor],
    scheme: Scheme,
    source: Path,
    stored: Mapping[str, StoredLinear] | None = None,
    formats: Mapping[str, WeightFormat] | None = None,
) -> dict[str, LazyTensor]:
    """Return the tensors of a model with `config` by our names, composed of those that `source` holds.

    `stored` are the linears that it holds quantized, by their foreign names. Of these, the ones in `formats`, by our
    names (`fused_formats`), keep their integers, the others are dequantized as they are read. Raises one
    `ModelFileError` that names, as the file does, all missing, unexpected and unfit tensors.
    """
    if config.n_layers > len(foreign):
        raise ModelFileError(
            f"{source}: {len(foreign)} tensors cannot make up the {config.n_layers} layers that the config asks for"
        )
    stored, formats = stored or {}, formats or {}
    wanted: dict[str, list[tuple[str, Leaves]]] = {}  # by our name the foreign modules, and the leaves of each
    for ours, shapes in _part_shapes(config):
        leaf = ours.rpartition(".")[2]
        wanted[ours] = [
            (name, stored[name].leaves if leaf == "weight" and name in stored else {leaf: (shape, WEIGHT_DTYPES)})
            for name, shape in _foreign_parts(ours, shapes, scheme)
        ]
    leaves = {f"{name}.{leaf}": fit for parts in wanted.values() for name, fits in parts for leaf, fit in fits.items()}
    _check(leaves, foreign, config, scheme, source)
    tensors: dict[str, LazyTensor] = {}
    for ours, parts in wanted.items():
        module, leaf = ours.rsplit(".", 1)
        found = []
        for name, fits in parts:
            there = {stem: foreign[f"{name}.{stem}"] for stem in fits}
            if leaf == "weight" and name in stored:
                matrix = stored[name].view(there)
                there = in_memory(matrix, formats[module]) if module in formats else {leaf: dequantized(matrix)}
            found.append(there)
        for stem in found[0]:
            tensors[f"{module}.{stem}"] = _compose(module, [there[stem] for there in found], config, scheme)
    return tensors


def linear_columns(config: ModelConfig) -> dict[str, int]:
    """Return the width of every kind of linear, by the last part of its name; a head that is tied counts."""
    return {
        "wqkv": config.dim,
        "wo": config.q_dim,
        "w_gate_up": config.dim,
        "w_down": config.hidden_dim,
        "lm_head": config.dim,
    }


def linear_parts(config: ModelConfig, scheme: Scheme) -> dict[str, tuple[str, ...]]:
    """Return every linear of a model by our name, with the foreign linears that are its rows."""
    blocks = [name for name in linear_columns(config) if name in scheme.layer]
    parts = {
        f"layers.{layer}.{name}": tuple(scheme.layer_prefix.format(layer) + theirs for theirs in scheme.layer[name])
        for layer in range(config.n_layers)
        for name in blocks
    }
    return parts | {"lm_head": (scheme.model["lm_head"],)}


def part_rows(config: ModelConfig, kind: str) -> list[int]:
    """Return the rows of each foreign part of a kind of module, empty where there is but one."""
    return {
        "wqkv": [config.q_dim, config.kv_dim, config.kv_dim],
        "w_gate_up": [config.hidden_dim, config.hidden_dim],
    }.get(kind, [])


def linear_shapes(config: ModelConfig, scheme: Scheme) -> dict[str, tuple[int, int]]:
    """Return the shape [out, in] of every linear by its foreign name; a head that is tied counts."""
    shapes = {}
    whole = {"wo": config.dim, "w_down": config.dim, "lm_head": config.vocab_size}
    for ours, parts in linear_parts(config, scheme).items():
        kind = ours.rpartition(".")[2]
        for name, rows in zip(parts, part_rows(config, kind) or [whole[kind]], strict=True):
            shapes[name] = (rows, linear_columns(config)[kind])
    return shapes


def fused_formats(
    config: ModelConfig, scheme: Scheme, stored: Mapping[str, StoredLinear]
) -> tuple[dict[str, WeightFormat], tuple[str, ...]]:
    """Return the formats of our linears that keep their integers, and what to say of those that cannot, in a line.

    One of ours is made up of several foreign ones, which all must have that format.
    """
    fused, lost = {}, Counter[str]()
    for ours, parts in linear_parts(config, scheme).items():
        if ours == "lm_head" and config.tie_embeddings:
            continue
        kinds = [stored[part].kind for part in parts if part in stored]
        formats = {stored[part].format if part in stored else None for part in parts}
        weight_format = formats.pop() if len(formats) == 1 else None
        if weight_format:
            fused[ours] = weight_format
        elif kinds:
            lost[", ".join(dict.fromkeys(kinds))] += 1
    found = [f"{count} linears of {kind}" for kind, count in lost.most_common()]
    return fused, (f"dequantized while loading, since no form of ours fits: {'; '.join(found)}",) if found else ()


def main_dtype(tensors: Iterable[LazyTensor]) -> torch.dtype:
    """Return the float dtype that most of the elements of `tensors` have."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.dtype not in WEIGHT_DTYPES:
            continue  # packed
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + torch.Size(tensor.shape).numel()
    return max(counts, key=lambda dtype: counts[dtype])


def shortened(names: Sequence[str]) -> str:
    """Return the first of `names`, and how many more there are."""
    shown = [f"{name if name.isprintable() else repr(name):.200}" for name in names[:SHOWN]]
    rest = len(names) - SHOWN
    return ", ".join([*shown, f"and {rest} more"] if rest > 0 else shown)


def _part_shapes(config: ModelConfig) -> Iterator[tuple[str, list[Shape]]]:
    """Yield our name of every tensor that `config` asks for, with the shapes of its parts."""
    yield "embedding.weight", [(config.vocab_size, config.dim)]
    for layer in range(config.n_layers):
        for name, shapes in _layer_part_shapes(config):
            yield f"layers.{layer}.{name}", shapes
    yield "norm.weight", [(config.dim,)]
    if not config.tie_embeddings:
        yield "lm_head.weight", [(config.vocab_size, config.dim)]


def _layer_part_shapes(config: ModelConfig) -> Iterator[tuple[str, list[Shape]]]:
    linears = [
        ("wqkv", [config.q_dim, config.kv_dim, config.kv_dim], config.dim, config.qkv_bias),
        ("wo", [config.dim], config.q_dim, config.output_bias),
        ("w_gate_up", [config.hidden_dim, config.hidden_dim], config.dim, config.mlp_bias),
        ("w_down", [config.dim], config.hidden_dim, config.mlp_bias),
    ]
    for name, rows, columns, bias in linears:
        yield f"{name}.weight", [(part, columns) for part in rows]
        if bias:
            yield f"{name}.bias", [(part,) for part in rows]
    norms = {"attention_norm": config.dim, "ffn_norm": config.dim}
    if config.qk_norm:
        norms |= {"q_norm": config.head_dim, "k_norm": config.head_dim}
    for name, size in norms.items():
        yield f"{name}.weight", [(size,)]


def _foreign_parts(ours: str, shapes: Sequence[Shape], scheme: Scheme) -> list[tuple[str, Shape]]:
    """Return the foreign module and the shape of every part of our tensor `ours`."""
    module = ours.rpartition(".")[0]
    if module in scheme.model:
        names: tuple[str, ...] = (scheme.model[module],)
    else:
        _, layer, module = module.split(".")
        assert module in scheme.layer, f"the scheme has no name for {module}: its reader must refuse such a config"
        names = tuple(scheme.layer_prefix.format(layer) + name for name in scheme.layer[module])
    return list(zip(names, shapes, strict=True))


def _compose(module: str, parts: Sequence[LazyTensor], config: ModelConfig, scheme: Scheme) -> LazyTensor:
    if module.endswith(".wqkv") and scheme.interleaved:
        query, key, value = parts
        parts = [HalfSplit(query, config.head_dim), HalfSplit(key, config.head_dim), value]
    return Concat(parts) if len(parts) > 1 else parts[0]


def _check(
    wanted: Leaves, foreign: Mapping[str, LazyTensor], config: ModelConfig, scheme: Scheme, source: Path
) -> None:
    # A head beside tied embeddings is a copy that some writers leave; Transformers does not read it either.
    head = {f"{scheme.model['lm_head']}.weight"} if config.tie_embeddings else set()
    known = head.union(wanted)
    ignored = (*scheme.ignored, *([SHAPE_LEAF] if any(name.endswith(".weight_packed") for name in wanted) else []))
    problems = {
        "missing tensors": [name for name in wanted if name not in foreign],
        "unexpected tensors": [name for name in foreign if name not in known and not name.endswith(ignored)],
        "tensors that do not fit the config": [
            f"{name} is {_describe(foreign[name])} where {list(shape)} is expected"
            for name, (shape, dtypes) in wanted.items()
            if name in foreign and (foreign[name].shape != shape or foreign[name].dtype not in dtypes)
        ],
    }
    found = [f"{kind} ({len(names)}): {shortened(names)}" for kind, names in problems.items() if names]
    if found:
        raise ModelFileError(f"{source}: " + "\n".join(found))


def _describe(tensor: LazyTensor) -> str:
    """Return the shape, and the dtype where it is none that weights have."""
    dtype = "" if tensor.dtype in WEIGHT_DTYPES else f"{str(tensor.dtype).removeprefix('torch.')} "
    return f"{dtype}{list(tensor.shape)}"
