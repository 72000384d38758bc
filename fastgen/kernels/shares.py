"""The end of attention: what warps, and programs, found of their positions becomes the output of a row.

Each knows of a row the largest score, the sum of the weights relative to it, and the weighted sum of the values, y. The
warps of a program leave these in shared memory, behind a barrier every thread adds a pair of dims up, in the order of
the warps. Where several programs share a row's positions, they leave theirs in global memory, and the last to come
(a ticket decides) adds them up in the order of the shares; nobody waits.

A part without visible positions has the maximum -inf and adds exactly nothing, so a row has the same bits whether
such parts are there or not. Source: Flash-Decoding, arXiv 2311.01282.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import load_floats, store_floats
from fastgen.kernels.masked import load_pair, store_four_floats

AT_ONCE = gl.constexpr(8)
"""Shares that are loaded together."""


@gluon.constexpr_function
def exchange_lines(warps, rows, d):
    """Return how many lines of 512 bytes the warps need to leave `rows` rows."""
    return (warps * rows * (d + 2) * 4 + 511) // 512


@gluon.jit
def level_of(top):
    """Return what weights are relative to: a maximum, or 0 for that of nothing."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def leave_rows(address, warp, lane, tops, sums, y, R: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Store what a warp has of R rows in shared memory; a barrier stands behind it.

    tops, sums: of row g (and g + 8); y: see `heads.add_values`.
    """
    CHUNKS: gl.constexpr = (D + 63) // 64
    g, t = lane // 4, lane % 4
    for s in gl.static_range(len(y)):
        row = warp * R + 8 * s + 2 * t
        at = address + row * (4 * D) + g * 32
        for c in gl.static_range(CHUNKS):
            inside = (2 * t + 8 * s < R) & (g < (D - 64 * c) // 8)
            for i in gl.static_range(2):
                a, b = y[s][4 * c + 2 * i], y[s][4 * c + 2 * i + 1]
                store_four_floats(at, (a[0], a[2], b[0], b[2]), inside, 256 * c + 16 * i)
                if R > 1:
                    store_four_floats(at, (a[1], a[3], b[1], b[3]), inside, 4 * D + 256 * c + 16 * i)
        of_rows = address + WARPS * R * D * 4 + (warp * R + 8 * s + g) * 8
        store_floats(of_rows, tops[s], sums[s], (t == 0) & (8 * s + g < R), 0)


@gluon.jit
def add_warps(address, row, dim, R: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Return the maximum, the sum of weights and y of dims dim, dim + 1 of a row that all warps have left."""
    tops, masses, values = (), (), ()
    for w in gl.static_range(WARPS):
        top, mass = load_floats(address + row * 8, WARPS * R * D * 4 + w * (R * 8))
        tops += (top,)
        masses += (mass,)
        values += (load_floats(address + (row * D + dim) * 4, w * (R * D * 4)),)
    return weighted(tops, masses, values)


@gluon.jit
def weighted(tops, masses, values):
    """Return the maximum, the sum of weights and the two y of all parts."""
    top = tops[0]
    for n in gl.static_range(1, len(tops)):
        top = gl.maximum(top, tops[n])
    level = level_of(top)
    total, low, high = gl.zeros_like(top), gl.zeros_like(top), gl.zeros_like(top)
    for n in gl.static_range(len(tops)):
        weight = gl.exp2(tops[n] - level)
        total = gl.fma(weight, masses[n], total)
        low, high = gl.fma(weight, values[n][0], low), gl.fma(weight, values[n][1], high)
    return top, total, low, high


@gluon.jit
def add_shares(
    partial, row, dim, here, lowest, shares, R: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr
):  # fmt: skip
    """Return the two y of dims dim, dim + 1 of a row divided by the weights, of the `shares` shares from `lowest` on.

    partial: SPLITS x R x D values, then SPLITS x R pairs of maximum and sum of weights. Eight shares are loaded at
    once; they are counted from 0, whichever of them are there.
    """
    zero = dim * 0.0
    top, total, low, high = zero + float("-inf"), zero, zero, zero
    for first in range(0, gl.where(lowest == 0, shares, SPLITS), AT_ONCE):
        tops, masses, values = (top,), (total,), ((low, high),)
        for n in gl.static_range(AT_ONCE):
            share = first + n
            present = here & (share < SPLITS) & ((share - lowest + SPLITS) % SPLITS < shares)
            peak, mass = load_pair(partial + SPLITS * R * D + (share * R + row) * 2, present, 0, True)
            tops += (gl.where(present, peak, float("-inf")),)
            masses += (mass,)
            values += (load_pair(partial + (share * R + row) * D + dim, present, 0, True),)
        top, total, low, high = weighted(tops, masses, values)
    return low / total, high / total
