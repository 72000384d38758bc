"""What form a weight matrix is stored in: bits, the weights that share a scale, and whether they have a zero point."""

from dataclasses import dataclass

GROUP_SIZES = (32, 64, 128, 256)
NARROWER_GROUPS = (128, 64, 32)
"""What a width takes, in this order, that the group which was asked for does not divide."""


@dataclass(frozen=True, kw_only=True)
class WeightFormat:
    """The form of one matrix [out, in]; `group_size` weights of a row share a scale, None: all of a row."""

    bits: int
    group_size: int | None = None
    symmetric: bool = True

    def __str__(self) -> str:
        if self.group_size is None:
            return f"int{self.bits}"
        return f"int{self.bits}-g{self.group_size}-{'sym' if self.symmetric else 'asym'}"

    def groups(self, columns: int) -> int:
        """Return how many groups a row of so many weights has."""
        return columns // self.group_size if self.group_size else 1


INT8 = WeightFormat(bits=8)


def int4(columns: int, group_size: int, *, symmetric: bool) -> WeightFormat:
    """Return the 4-bit format of matrices with `columns` columns: in groups of `group_size` where it divides them,
    else of the largest of 128, 64 and 32 that does, and int8 where none does."""
    for size in (group_size, *NARROWER_GROUPS):
        if columns % size == 0:
            return WeightFormat(bits=4, group_size=size, symmetric=symmetric)
    return INT8
