"""What the lanes of a warp do together, for `machine`: shuffles, reductions, products of the tensor cores.

Values are arrays with one element for each thread of a program, 32 a warp. Source: PTX ISA 8.7, shfl.sync,
redux.sync, and "Matrix Fragments for mma.m16n8k16" and "for mma.m16n8k32".
"""

import numpy as np

from tests.kernels import ptx
from tests.kernels.ptx import Lanes

LANE = np.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4
"""Where a lane stands in a fragment: the row of A and C, the column of B; and the columns, or rows of B."""


def shuffled(how: str, value: Lanes, other: Lanes) -> Lanes:
    """shfl.sync: another lane's value, bfly or idx, the whole warp taking part."""
    thread = np.arange(value.size)
    lane = thread % 32 ^ other & 31 if how == "bfly" else other & 31
    return value[thread // 32 * 32 + lane]


def reduced(how: str, value: Lanes, mask: Lanes) -> Lanes:
    """redux.sync: min, max or add of the lanes in each lane's mask."""
    reduce = {"min": np.min, "max": np.max, "add": np.sum}[how]
    members = (mask[:, None] >> LANE.astype(np.uint32) & 1).astype(bool)
    warps = value.reshape(-1, 32)
    return np.array([reduce(warps[thread // 32][members[thread]]) for thread in range(value.size)], value.dtype)


def multiplied(kinds: tuple[str, ...], a: list[Lanes], b: list[Lanes], c: list[Lanes]) -> list[Lanes]:
    """mma.row.col of 16 rows and 8 columns: c + a b, given as the registers of a fragment, for types (D, A, B, C).

    A and B are words of 16-bit floats (K = 16), whose products are added in fp64 and rounded once, or of bytes
    (K = 32, or 16 of half as many words), which are exact.
    """
    left, right = _columns(a, kinds[1]), _columns(b, kinds[2])
    wide = np.float64 if kinds[0] == "f32" else np.int64
    warps, depth = left[0].shape[1], 2 * len(left) * len(a)
    first, second = np.zeros((warps, 16, depth), wide), np.zeros((warps, depth, 8), wide)
    total = np.zeros((warps, 16, 8), wide)
    for n in range(len(left)):
        for j in range(len(a)):
            first[:, GROUP + 8 * (j % 2), len(left) * MEMBER + n + 4 * len(left) * (j // 2)] = left[n][j]
        for j in range(len(b)):
            second[:, len(left) * MEMBER + n + 4 * len(left) * j, GROUP] = right[n][j]
    for j in range(4):
        total[:, GROUP + 8 * (j // 2), 2 * MEMBER + j % 2] = c[j].reshape(-1, 32)
    with np.errstate(all="ignore"):
        total = (first @ second + total).astype(c[0].dtype)
    return [total[:, GROUP + 8 * (j // 2), 2 * MEMBER + j % 2].reshape(-1) for j in range(4)]


def _columns(words: list[Lanes], kind: str) -> np.ndarray:
    """Return [elements of a word, words, warps, 32]."""
    whole = np.stack(words).reshape(len(words), -1, 32)
    if kind in ("bf16", "f16"):
        return np.stack(ptx.halves(whole, kind))
    return np.moveaxis(np.ascontiguousarray(whole)[..., None].view(ptx.TYPES[kind]), -1, 0)
