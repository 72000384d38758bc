"""compressed-tensors: its description of quantized weights in `config.json`, and what we write and others do.

In `pack-quantized` form a linear `X` has `X.weight_packed`, `X.weight_scale`, `X.weight_shape` and, if asymmetric,
`X.weight_zero_point` in place of `X.weight` (layouts: `quantize.int4`, `quantize.int8`), in `int-quantized` form an
int8 `X.weight` and `X.weight_scale`. `quantization_config` says which linear has which form: `config_groups` by target
(a name, `re:` and a pattern, or the class `Linear`; the most specific one counts), and names to `ignore`
(https://github.com/vllm-project/compressed-tensors, quantization/quant_config.py, utils/match.py, compressors/).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from fastgen.checkpoint.integers import (
    SCALE_DTYPES,
    IntegerMatrix,
    StoredLinear,
    columns_out_of_order,
    fitting_format,
    transposed,
    unpack,
)
from fastgen.checkpoint.lazy import Bounds, Computed, LazyTensor
from fastgen.errors import ModelFileError
from fastgen.files import naming
from quantize import int4
from quantize.format import WeightFormat

PACKED = "pack-quantized"
INTEGERS = "int-quantized"
MIXED = "mixed-precision"  # every group names its own
SCATTERED = ("group", "dynamic", True)
ORDERS = (None, False, "weight", "static", *SCATTERED)
"""Of activations, in which GPTQ chose the integers; the scattered ones leave groups of columns that do not follow each
other, as `weight_g_idx` says."""

UNSET = -1
"""What `weight_g_idx` is made of at first; where one is left, the columns are in order (lifecycle/forward_helpers.py
in version 0.17)."""

LINEAR = "Linear"
MAX_PATTERN, MAX_REPEATS = 200, 4
REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")  # can take exponential time to match
REPEAT = re.compile(r"[*+{]")  # so many in a row take time to the power of their number


@dataclass(frozen=True, kw_only=True)
class _Form:
    """What a config group says of its weights; `group_size` None: one scale a row."""

    bits: int
    group_size: int | None
    symmetric: bool
    packed: bool
    scattered: bool

    @property
    def kind(self) -> str:
        """The form in words."""
        return f"compressed-tensors int{self.bits}" + (f" in groups of {self.group_size}" if self.group_size else "")


def stored_shapes(weight_format: WeightFormat, rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors that stand for a weight [rows, columns], `weight_shape` apart, and their shapes."""
    groups = weight_format.groups(columns)
    shapes: dict[str, tuple[int, ...]] = {
        "weight_packed": (rows, -(-columns * weight_format.bits // 32)),
        "weight_scale": (rows, groups),
    }
    if not weight_format.symmetric:
        shapes["weight_zero_point"] = (-(-rows // int4.PER_WORD), groups)
    return shapes


def compressed_linears(
    description: object, shapes: Mapping[str, tuple[int, int]], tensors: Mapping[str, LazyTensor], source: Path
) -> dict[str, StoredLinear]:
    """Return the quantized ones of the linears with these `shapes`, [out, in] by name, by a `quantization_config`.

    Raises `ModelFileError` for a format or a field that is not supported, by name; `source` is the config's file.
    """
    fields = _mapping(description, "quantization_config", source)
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.get(name):
            raise ModelFileError(f"{source}: quantization_config: {name} is not supported")
    default = fields.get("format", PACKED)
    if default not in (PACKED, INTEGERS, MIXED):
        raise ModelFileError(f"{source}: quantization_config: the format {default!r:.50} is not supported")
    groups = _mapping(fields.get("config_groups"), "config_groups", source)
    by_target: dict[str, _Form] = {}
    for name, group in groups.items():
        entry = _mapping(group, f"config_groups.{name}", source)
        form = _form(entry, default, f"config_groups.{name}", source)
        by_target |= dict.fromkeys(_targets(entry.get("targets"), f"config_groups.{name}.targets", source), form)
    ignored = _targets(fields.get("ignore") or [], "ignore", source)
    linears = {}
    for linear, (rows, columns) in shapes.items():
        target = _best(linear, list(by_target))
        if target is None or _best(linear, ignored) is not None:
            continue
        with naming(source):
            linears[linear] = _stored(linear, by_target[target], rows, columns, tensors)
    return linears


def quantization_config(formats: Mapping[str, WeightFormat | None]) -> dict[str, object]:
    """Return the `quantization_config` of linears with these formats; None: not quantized."""
    counts = Counter(weight_format for weight_format in formats.values() if weight_format)
    groups = {}
    for number, (weight_format, _) in enumerate(counts.most_common()):
        names = [name for name, other in formats.items() if other == weight_format]
        groups[f"group_{number}"] = {
            "targets": names if number else [LINEAR],
            "weights": {
                "num_bits": weight_format.bits,
                "type": "int",
                "symmetric": weight_format.symmetric,
                "strategy": "group" if weight_format.group_size else "channel",
                "group_size": weight_format.group_size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": PACKED,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [name for name, weight_format in formats.items() if weight_format is None],
        "kv_cache_scheme": None,
    }


def _form(group: Mapping[str, object], default: object, place: str, source: Path) -> _Form:
    """Return what a config group says of its weights, if it is a form that can be read."""
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise ModelFileError(f"{source}: {place}: {name} is not supported, only weights may be quantized")
    weights = _mapping(group.get("weights"), f"{place}.weights", source)
    packing, bits, strategy = group.get("format") or default, weights.get("num_bits"), weights.get("strategy")
    size, symmetric = weights.get("group_size"), weights.get("symmetric", True)
    if strategy is None and type(size) is int:
        strategy = "channel" if size == -1 else "group"
    known = (
        packing in (PACKED, INTEGERS)
        and weights.get("type", "int") == "int"
        and not weights.get("dynamic")
        and bits in ((4, 8) if packing == PACKED else (8,))
        and isinstance(symmetric, bool)
        and weights.get("actorder") in ORDERS
    )
    sized = strategy == "channel" or (strategy == "group" and type(size) is int and size > 0)
    if not known or not sized:
        shown = {name: value for name, value in weights.items() if value not in (None, False, {})}
        raise ModelFileError(
            f"{source}: {place} has weights of {shown!r:.200} in the format {packing!r:.50}, which is not supported; "
            f"expected int of 4 or 8 bits, by channel or in groups, {PACKED}, or of 8 bits {INTEGERS}"
        )
    assert isinstance(bits, int) and isinstance(symmetric, bool), "as checked"
    return _Form(
        bits=bits,
        group_size=size if strategy == "group" and isinstance(size, int) else None,
        symmetric=symmetric,
        packed=packing == PACKED,
        scattered=weights.get("actorder") in SCATTERED,
    )


def _stored(linear: str, form: _Form, rows: int, columns: int, tensors: Mapping[str, LazyTensor]) -> StoredLinear:
    size = min(form.group_size or columns, columns)
    groups = -(-columns // size)
    leaves: dict[str, tuple[tuple[int, ...], tuple[torch.dtype, ...]]] = {
        "weight_scale": ((rows, groups), SCALE_DTYPES),
    }
    if form.packed:
        leaves["weight_packed"] = ((rows, -(-columns * form.bits // 32)), (torch.int32,))
    else:
        leaves["weight"] = ((rows, columns), (torch.int8,))
    if not form.symmetric:
        zero = tensors.get(f"{linear}.weight_zero_point")
        loose = not form.packed or (zero is not None and zero.dtype == torch.int8)  # early versions did not pack them
        words = (-(-rows * form.bits // 32), groups)
        leaves["weight_zero_point"] = ((rows, groups), (torch.int8,)) if loose else (words, (torch.int32,))
    group_of = None
    if form.scattered:
        leaves["weight_g_idx"] = ((columns,), (torch.int32,))
        index = tensors.get(f"{linear}.weight_g_idx")
        group_of = _scattered(index, columns, size, linear) if index is not None else None
    return StoredLinear(
        leaves=leaves,
        format=fitting_format(
            bits=form.bits, columns=columns, group_size=size, symmetric=form.symmetric, in_order=group_of is None
        ),
        kind=form.kind + (" in act-order" if group_of is not None else ""),
        view=partial(_view, form=form, columns=columns, group_size=size, group_of=group_of),
    )


def _scattered(index: LazyTensor, columns: int, group_size: int, linear: str) -> torch.Tensor | None:
    """Return the group of every column, None where they stand in order; all groups are of one size."""
    group_of = columns_out_of_order(index, columns, group_size, linear, unset=UNSET)
    if group_of is not None:
        counts = torch.bincount(group_of, minlength=-(-columns // group_size))[: columns // group_size]
        if (counts != group_size).any():
            found = f"{counts.min()} to {counts.max()}"
            raise ModelFileError(f"{linear}: weight_g_idx has groups of {found} columns, expected {group_size}")
    return group_of


def _view(
    parts: Mapping[str, LazyTensor], *, form: _Form, columns: int, group_size: int, group_of: torch.Tensor | None
) -> IntegerMatrix:
    scale, zero, packed = parts["weight_scale"], parts.get("weight_zero_point"), parts.get("weight_packed")
    q = parts["weight"] if packed is None else _unpacked(packed, form.bits, columns)
    if zero is not None and zero.dtype == torch.int32:
        zero = transposed(_unpacked(transposed(zero), form.bits, scale.shape[0]))
    direct = packed is not None and form.bits == 4 and columns % int4.PER_WORD == 0
    return IntegerMatrix(
        q=q, scale=scale, zero=zero, group_size=group_size, group_of=group_of, packed=packed if direct else None
    )


def _unpacked(words: LazyTensor, bits: int, columns: int) -> LazyTensor:
    """Return values int8 [n, columns] of int32 words [n, ..] along their rows."""
    per_word = 32 // bits

    def compute(bounds: Bounds) -> torch.Tensor:
        (top, bottom), (left, right) = bounds
        first = left // per_word
        values = unpack(words[top:bottom, first : -(-right // per_word)].contiguous(), bits)
        return values[:, left - first * per_word : right - first * per_word].contiguous()

    return Computed((words.shape[0], columns), torch.int8, compute)


def _best(linear: str, targets: Sequence[str]) -> str | None:
    """Return the most specific of `targets` that means `linear`."""
    if linear in targets:
        return linear
    patterns = [target for target in targets if target.startswith("re:") and re.match(target[3:], linear)]
    return patterns[0] if patterns else LINEAR if LINEAR in targets else None


def _targets(value: object, place: str, source: Path) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ModelFileError(f"{source}: quantization_config: {place} is {value!r:.100}, expected a list of names")
    for target in value:
        if target.startswith("re:"):
            try:
                tame = len(REPEAT.findall(target)) <= MAX_REPEATS and not REPEATED_GROUP.search(target)
                usable = len(target) <= MAX_PATTERN and tame and re.compile(target[3:])
            except re.error:
                usable = False
            if not usable:
                raise ModelFileError(
                    f"{source}: quantization_config: {place} has {target!r:.100}, a pattern that is damaged, too long, "
                    f"repeats a group, or has more than {MAX_REPEATS} repeats"
                )
    return value


def _mapping(value: object, place: str, source: Path) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ModelFileError(f"{source}: quantization_config: {place} is {value!r:.100}, expected an object")
    return value
