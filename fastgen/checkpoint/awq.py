"""AWQ checkpoints in AutoAWQ's `gemm` packing: 4 bits, packed along the output, out of order.

    tensor   shape               dtype  content
    qweight  [in, out / 8]       int32  q of the columns 8j .. 8j + 7 in word j; its nibbles are the columns `ORDER`
    qzeros   [groups, out / 8]   int32  zero points, packed the same way
    scales   [groups, out]       float  w = (q - zero) * scale

Source: AutoAWQ `awq/modules/linear/gemm.py`. The integers are packed anew, along the input and in order.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fastgen.checkpoint.fields import Fields
from fastgen.checkpoint.integers import (
    SCALE_DTYPES,
    IntegerMatrix,
    StoredLinear,
    fitting_format,
    transposed,
    turned,
    unpack,
)
from fastgen.checkpoint.lazy import Bounds, Computed, LazyTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight columns each nibble is, from the lowest."""

PER_WORD = 8


def awq_linears(
    fields: Fields, shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, LazyTensor]
) -> dict[str, StoredLinear]:
    """Return the quantized ones of the linears with these `shapes`, [out, in] by name: those that have a `qweight`.

    Raises `ModelFileError` for a form that is not supported.
    """
    bits, group_size = _either(fields, "bits", "w_bit"), _either(fields, "group_size", "q_group_size")
    if fields.integer(bits) != 4:
        raise fields.error(bits, "4")
    size = fields.get(group_size)
    if type(size) is not int or not (size == -1 or size > 0):
        raise fields.error(group_size, "a number of weights, or -1 for whole rows")
    if str(fields.get("version")).lower() != "gemm":
        raise fields.error("version", "'gemm': no other packing is supported")
    if "zero_point" in fields and not fields.boolean("zero_point"):
        raise fields.error("zero_point", "true")
    stored = {}
    for name, (rows, columns) in shapes.items():
        if f"{name}.qweight" not in tensors:
            continue
        group = columns if size == -1 else min(size, columns)
        groups = -(-columns // group)
        stored[name] = StoredLinear(
            leaves={
                "qweight": ((columns, -(-rows // PER_WORD)), (torch.int32,)),
                "qzeros": ((groups, -(-rows // PER_WORD)), (torch.int32,)),
                "scales": ((groups, rows), SCALE_DTYPES),
            },
            format=fitting_format(bits=4, columns=columns, group_size=group, symmetric=False),
            kind=f"AWQ int4 in groups of {group}",
            view=partial(_view, group_size=group),
        )
    return stored


def _either(fields: Fields, name: str, older: str) -> str:
    return older if older in fields and name not in fields else name


def _view(parts: Mapping[str, LazyTensor], *, group_size: int) -> IntegerMatrix:
    scale = transposed(parts["scales"])
    columns, rows = parts["qweight"].shape[0], scale.shape[0]
    return IntegerMatrix(
        q=Computed((rows, columns), torch.int8, lambda bounds: _values(parts["qweight"], bounds)),
        scale=scale,
        zero=Computed(scale.shape, torch.int8, lambda bounds: _values(parts["qzeros"], bounds)),
        group_size=group_size,
    )


def _values(words: LazyTensor, bounds: Bounds) -> Tensor:
    """Return the values int8 [out, ..] within `bounds` of words [.., out / 8]."""
    (top, bottom), others = bounds
    first = top // PER_WORD
    nibbles = unpack(words[slice(*others), first : -(-bottom // PER_WORD)], 4)
    places = torch.tensor(ORDER).argsort()
    values = nibbles.unflatten(1, (-1, PER_WORD))[:, :, places].flatten(1)
    return turned(values[:, top - first * PER_WORD : bottom - first * PER_WORD])
