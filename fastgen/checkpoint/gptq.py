"""GPTQ checkpoints (AutoGPTQ, GPTQModel): 4 or 8 bits, packed along the input.

    tensor   shape                 dtype     content
    qweight  [in * bits/32, out]   int32     q of the rows 32/bits j .. of a column in word j, low bits first
    qzeros   [groups, out*bits/32] int32     zero points, packed along `out`; one less than they are in version 1
    scales   [groups, out]         float     w = (q - zero) * scale
    g_idx    [in]                  int32     the group of every input, where the file has it; out of order by `desc_act`

Transposed, 4-bit words are ours. Sources: AutoGPTQ `nn_modules/qlinear/qlinear_cuda.py` (where the one that is added
wraps around), GPTQModel `quantization/config.py` (`checkpoint_format`: gptq is version 1, gptq_v2 version 2).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastgen.checkpoint.fields import Fields
from fastgen.checkpoint.integers import (
    SCALE_DTYPES,
    IntegerMatrix,
    Leaves,
    StoredLinear,
    columns_out_of_order,
    fitting_format,
    transposed,
    turned,
    unpack,
)
from fastgen.checkpoint.lazy import Bounds, Computed, LazyTensor
from fastgen.errors import ModelFileError

VERSIONS = {"gptq": 1, "gptq_v2": 2}
BITS = (4, 8)


def gptq_linears(
    fields: Fields, shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, LazyTensor], source: Path
) -> dict[str, StoredLinear]:
    """Return the quantized ones of the linears with these `shapes`, [out, in] by name: those that have a `qweight`.

    Raises `ModelFileError` for a form that is not supported or contradicts the tensors; `source` is the weights' file.
    """
    bits = fields.integer("bits")
    if bits not in BITS:
        raise fields.error("bits", "4 or 8")
    version = _version(fields)
    symmetric = "sym" in fields and fields.boolean("sym")
    group_size = fields.get("group_size")
    if type(group_size) is not int or not (group_size == -1 or group_size > 0):
        raise fields.error("group_size", "a number of weights, or -1 for whole rows")
    if fields.get("dynamic"):
        raise fields.error("dynamic", "nothing: another form for single linears is not supported")
    out_of_order = "desc_act" in fields and fields.boolean("desc_act")
    stored = {}
    for name, (rows, columns) in shapes.items():
        if f"{name}.qweight" not in tensors:
            continue
        size = columns if group_size == -1 else min(group_size, columns)
        index = tensors.get(f"{name}.g_idx")
        if index is None and out_of_order and size < columns:
            raise ModelFileError(
                f"{source}: {name}.g_idx is missing, and desc_act says that the groups are out of order"
            )
        group_of = columns_out_of_order(index, columns, size, name) if index is not None else None
        view = partial(
            _view, columns=columns, bits=bits, version=version, symmetric=symmetric, group_size=size, group_of=group_of,
            place=f"{source}: {name}",
        )  # fmt: skip
        stored[name] = StoredLinear(
            leaves=_leaves(rows, columns, bits, size, with_index=index is not None),
            format=fitting_format(
                bits=bits, columns=columns, group_size=size, symmetric=symmetric, in_order=group_of is None
            ),
            kind=f"GPTQ int{bits}" + (" in act-order" if group_of is not None else f" in groups of {size}"),
            view=view,
        )
    return stored


def _version(fields: Fields) -> int:
    for name in ("checkpoint_format", "format"):
        value = fields.get(name)
        if value is not None and (not isinstance(value, str) or value not in VERSIONS):
            raise fields.error(name, f"{' or '.join(VERSIONS)}: no other packing is supported")
        if isinstance(value, str):
            return VERSIONS[value]
    return 1


def _leaves(rows: int, columns: int, bits: int, group_size: int, *, with_index: bool) -> Leaves:
    groups, integers = -(-columns // group_size), (torch.int32,)
    leaves: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "qweight": ((-(-columns * bits // 32), rows), integers),
        "qzeros": ((groups, -(-rows * bits // 32)), integers),
        "scales": ((groups, rows), SCALE_DTYPES),
    }
    return leaves | {"g_idx": ((columns,), integers)} if with_index else leaves


def _view(
    parts: Mapping[str, LazyTensor],
    *,
    columns: int,
    bits: int,
    version: int,
    symmetric: bool,
    group_size: int,
    group_of: Tensor | None,
    place: str,
) -> IntegerMatrix:
    words, per_word = parts["qweight"], 32 // bits
    rows, scale = words.shape[1], transposed(parts["scales"])

    def q(bounds: Bounds) -> Tensor:
        (top, bottom), (left, right) = bounds
        first = left // per_word
        values = unpack(turned(words[first : -(-right // per_word), top:bottom]), bits)
        return values[:, left - first * per_word : right - first * per_word].contiguous()

    def zero(bounds: Bounds) -> Tensor:
        (top, bottom), groups = bounds
        first = top // per_word
        values = unpack(parts["qzeros"][slice(*groups), first : -(-bottom // per_word)], bits)
        if version == 1:  # stored less one; what is added wraps around
            half = 1 << (bits - 1)
            values = ((values.short() + half + 1) % (2 * half) - half).to(torch.int8)
        return turned(values[:, top - first * per_word : bottom - first * per_word])

    def checked_scale(bounds: Bounds) -> Tensor:
        if zero(bounds).any():
            raise ModelFileError(f"{place}: has zero points, though the config says 'sym'; the checkpoint is damaged")
        return scale.read(bounds)

    return IntegerMatrix(
        q=Computed((rows, columns), torch.int8, q),
        scale=Computed(scale.shape, scale.dtype, checked_scale) if symmetric else scale,
        zero=None if symmetric else Computed(scale.shape, torch.int8, zero),
        group_size=group_size,
        group_of=group_of,
        packed=transposed(words) if bits == 4 else None,
    )
