"""Which linear of a model gets which format: the flags `--quant --group-size --symmetric --keep`, by name.

    scheme = Scheme(quant="int4", group_size=64, keep="lm_head=bf16,layers.0=int8,w_down=int8")
    formats = scheme.formats(config)     # {"layers.0.wqkv": INT8, "layers.1.wqkv": int4 in groups of 64, ...}

Linears alone are quantized; embeddings, norms and biases stay. The head gets int8 whatever the others get: four bits
there cost the most. A quantized head of a model with tied embeddings is a matrix of its own, beside the embedding.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fastgen.checkpoint.names import HF, linear_columns, linear_parts
from fastgen.config import ModelConfig
from fastgen.errors import UsageError
from quantize.format import GROUP_SIZES, INT8, WeightFormat, int4

QUANTS = ("int8", "int4")
PLAIN = "bf16"
"""In a rule: not quantized, in whatever precision the model has."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """What was asked for. Raises `UsageError` for values that are not known."""

    quant: str
    group_size: int = 128
    symmetric: bool = False
    keep: str | None = None

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise UsageError(f"--quant {self.quant}: not built yet; expected {' or '.join(QUANTS)}")
        if self.group_size not in GROUP_SIZES:
            raise UsageError(f"--group-size {self.group_size}: expected one of {', '.join(map(str, GROUP_SIZES))}")

    def formats(self, config: ModelConfig) -> dict[str, WeightFormat]:
        """Return the formats of the linears that are quantized, by our names.

        Raises `UsageError` for a rule of `keep` that is no rule or names nothing, and for groups that nothing has.
        """
        wanted = dict.fromkeys(linear_parts(config, HF), self.quant) | {"lm_head": "int8"}
        for pattern, value in self._rules():
            names = [name for name in wanted if _matches(pattern, name)]
            if not names:
                raise UsageError(
                    f"--keep {pattern}={value}: matches no linear; expected lm_head, layers.N or one of "
                    f"{', '.join(name for name in linear_columns(config) if name != 'lm_head')}"
                )
            wanted |= dict.fromkeys(names, value)
        if set(wanted.values()) == {PLAIN}:
            raise UsageError(f"--keep {self.keep}: leaves nothing to quantize")
        if "int4" not in wanted.values() and self.group_size != Scheme.group_size:
            raise UsageError(f"--group-size {self.group_size}: only int4 has groups, and nothing is int4 here")
        return {name: self._format(name, value, config) for name, value in wanted.items() if value != PLAIN}

    def _format(self, name: str, value: str, config: ModelConfig) -> WeightFormat:
        if value == "int8":
            return INT8
        columns = linear_columns(config)[name.rpartition(".")[2]]
        return int4(columns, self.group_size, symmetric=self.symmetric)

    def _rules(self) -> list[tuple[str, str]]:
        rules = []
        for rule in filter(None, (self.keep or "").split(",")):
            pattern, _, value = (part.strip() for part in rule.partition("="))
            if not pattern or value not in (PLAIN, *QUANTS):
                raise UsageError(f"--keep {rule}: expected NAME=FORMAT, with a format of {PLAIN}, {', '.join(QUANTS)}")
            rules.append((pattern, value))
        return rules


def contradiction(scheme: Scheme, config: ModelConfig, stored: Mapping[str, WeightFormat]) -> str | None:
    """Return in words how a folder that is quantized already differs from what was asked for, None if it does not."""
    wanted = scheme.formats(config)
    for name in wanted.keys() | stored.keys():
        if wanted.get(name) != stored.get(name):
            return f"{name} is {stored.get(name, 'not quantized')}, not {wanted.get(name, 'unquantized')}"
    return None


def describe(formats: Mapping[str, WeightFormat]) -> str:
    """Return the formats in a word or two, the most frequent first: `int4-g128-asym, int8`."""
    counts: dict[str, int] = {}
    for weight_format in formats.values():
        counts[str(weight_format)] = counts.get(str(weight_format), 0) + 1
    return ", ".join(sorted(counts, key=lambda name: -counts[name]))


def _matches(pattern: str, name: str) -> bool:
    """Return whether the parts of `pattern`, `*` for any one, stand somewhere in a row among those of `name`."""
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(want in ("*", part) for want, part in zip(wanted, parts[start:], strict=False))
        for start in range(len(parts) - len(wanted) + 1)
    )
