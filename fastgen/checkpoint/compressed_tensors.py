"""The on-disk form of quantized weights: compressed-tensors' `pack-quantized`, and its description in `config.json`.

A linear `X` has `X.weight_packed`, `X.weight_scale`, `X.weight_shape` and, if asymmetric, `X.weight_zero_point` in
place of `X.weight`; layouts: `quantize.int4`, `quantize.int8`. `quantization_config` says which linear has which form:
`config_groups` by target (a name, `re:` and a pattern, or the class `Linear`; the most specific one counts), and names
to `ignore` (https://github.com/vllm-project/compressed-tensors, quantization/quant_config.py and utils/match.py).
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

from fastgen.checkpoint.lazy import Bounds, LazyTensor
from fastgen.errors import ModelFileError
from quantize import int4, int8
from quantize.format import GROUP_SIZES, INT8, WeightFormat

PACKED = "pack-quantized"
LINEAR = "Linear"
MAX_PATTERN = 200
REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")  # can take exponential time to match


class Int8Weight(LazyTensor):
    """int8 [out, in], stored as int32 [out, ceil(in / 4)]."""

    def __init__(self, packed: LazyTensor, columns: int) -> None:
        super().__init__((packed.shape[0], columns), torch.int8)
        self.packed = packed

    def read(self, bounds: Bounds) -> torch.Tensor:
        (top, bottom), (left, right) = bounds
        return int8.unpack(self.packed[top:bottom], self.shape[1])[:, left:right].contiguous()


class ZeroPoints(LazyTensor):
    """Zero points int8 [out, groups], stored as int32 [ceil(out / 8), groups]."""

    def __init__(self, packed: LazyTensor, rows: int) -> None:
        super().__init__((rows, packed.shape[1]), torch.int8)
        self.packed = packed

    def read(self, bounds: Bounds) -> torch.Tensor:
        (top, bottom), (left, right) = bounds
        first = top // int4.PER_WORD
        words = self.packed[first : -(-bottom // int4.PER_WORD)]
        rows = int4.unpack_rows(words, min(words.shape[0] * int4.PER_WORD, self.shape[0]))
        start = first * int4.PER_WORD
        return rows[top - start : bottom - start, left:right].contiguous()


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


def read_formats(description: object, linears: Iterable[str], source: Path) -> dict[str, WeightFormat]:
    """Return the format of every one of `linears` that is quantized, by a `quantization_config`.

    Raises `ModelFileError` for a method, a format or a field that is not supported, by name.
    """
    fields = _mapping(description, "quantization_config", source)
    method, kind = fields.get("quant_method"), fields.get("format", PACKED)
    if method != "compressed-tensors" or kind != PACKED:
        raise ModelFileError(
            f"{source}: quantization_config: weights by {method!r:.50} in the format {kind!r:.50} are not supported; "
            f"expected compressed-tensors, {PACKED}"
        )
    for name in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if fields.get(name):
            raise ModelFileError(f"{source}: quantization_config: {name} is not supported")
    groups = _mapping(fields.get("config_groups"), "config_groups", source)
    by_target: dict[str, WeightFormat] = {}
    for name, group in groups.items():
        entry = _mapping(group, f"config_groups.{name}", source)
        weight_format = _format(entry, f"config_groups.{name}", source)
        by_target |= dict.fromkeys(
            _targets(entry.get("targets"), f"config_groups.{name}.targets", source), weight_format
        )
    ignored = _targets(fields.get("ignore") or [], "ignore", source)
    formats = {}
    for linear in linears:
        target = _best(linear, list(by_target))
        if target is not None and _best(linear, ignored) is None:
            formats[linear] = by_target[target]
    return formats


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


def _format(group: Mapping[str, object], place: str, source: Path) -> WeightFormat:
    """Return what a config group says of its weights, if it is a form that we have."""
    for name in ("input_activations", "output_activations"):
        if group.get(name):
            raise ModelFileError(f"{source}: {place}: {name} is not supported, only weights may be quantized")
    weights = _mapping(group.get("weights"), f"{place}.weights", source)
    found = WeightFormat(
        bits=weights.get("num_bits"),  # type: ignore[arg-type]  # whatever is no number equals no form below
        group_size=weights.get("group_size") if weights.get("strategy") == "group" else None,  # type: ignore[arg-type]
        symmetric=weights.get("symmetric", True) is True,
    )
    known = [WeightFormat(bits=4, group_size=size, symmetric=flag) for size in GROUP_SIZES for flag in (True, False)]
    plain = weights.get("type", "int") == "int" and not weights.get("dynamic") and not weights.get("actorder")
    strategy = weights.get("strategy") in ("group", "channel")
    if group.get("format") not in (None, PACKED) or not plain or not strategy or found not in [INT8, *known]:
        shown = {name: value for name, value in weights.items() if value not in (None, False, {})}
        raise ModelFileError(
            f"{source}: {place} has weights of {shown!r:.200}, which is not supported; expected {PACKED} int, 8 bits "
            f"by channel and symmetric, or 4 bits in groups of {', '.join(map(str, GROUP_SIZES))}"
        )
    return found


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
                usable = len(target) <= MAX_PATTERN and not REPEATED_GROUP.search(target) and re.compile(target[3:])
            except re.error:
                usable = False
            if not usable:
                raise ModelFileError(
                    f"{source}: quantization_config: {place} has {target!r:.100}, a pattern that is damaged, too long, "
                    "or repeats a group"
                )
    return value


def _mapping(value: object, place: str, source: Path) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise ModelFileError(f"{source}: quantization_config: {place} is {value!r:.100}, expected an object")
    return value
