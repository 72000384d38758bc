"""The end of attention: what warps, and programs, found of their positions becomes the output of a row.

Each knows of a row the largest score, the sum of the weights relative to it, and the weighted sum of the values, y. The
warps of a program leave these in shared memory, behind a barrier every thread adds two or four dims up, in the order of
the warps. Where several programs share a row's positions, they leave theirs in global memory, and the last to come
(a ticket decides) adds them up in the order of the shares; nobody waits.

A part without visible positions has the maximum -inf and adds exactly nothing, so a row has the same bits whether
such parts are there or not. Source: Flash-Decoding, arXiv 2311.01282.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import load_floats, load_four, load_global, recast, store_floats
from fastgen.kernels.masked import load_pair, store_four_floats, store_words

AT_ONCE = gl.constexpr(8)
"""Shares that are loaded together."""


@gluon.constexpr_function
def exchange_lines(warps, rows, d):
    """Return how many lines of 512 bytes the warps need to leave `rows` rows."""
    return (warps * rows * (row_pitch(d) + 8) + 511) // 512


@gluon.constexpr_function
def row_pitch(d):
    """Return the bytes from row to row in shared memory, such that neighbours lie in different banks."""
    return 4 * d + 16


@gluon.constexpr_function
def dims_of(warps, rows, d):
    """Return how many neighbouring dims a thread adds up: two, or four where it would have several pairs."""
    return 2 if rows * d <= 2 * 32 * warps else 4


@gluon.jit
def level_of(top):
    """Return what weights are relative to: a maximum, or 0 for that of nothing."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def leave_rows(address, warp, lane, top, total, y, R: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Store what a warp has of R rows in shared memory; a barrier stands behind it.

    top, total: of row g; y: see `heads.add_values`.
    """
    g, t = lane // 4, lane % 4
    at = address + (warp * R + 2 * t) * row_pitch(D) + g * 32
    for c in gl.static_range((D + 63) // 64):
        inside = (2 * t < R) & (g < (D - 64 * c) // 8)
        for i in gl.static_range(2):
            a, b = y[4 * c + 2 * i], y[4 * c + 2 * i + 1]
            store_four_floats(at, (a[0], a[2], b[0], b[2]), inside, 256 * c + 16 * i)
            if R > 1:
                store_four_floats(at, (a[1], a[3], b[1], b[3]), inside, row_pitch(D) + 256 * c + 16 * i)
    store_floats(address + WARPS * R * row_pitch(D) + (warp * R + g) * 8, top, total, (t == 0) & (g < R), 0)


@gluon.jit
def add_warps(address, row, dim, DIMS: gl.constexpr, R: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr):
    """Return the maximum, the sum of weights and y of DIMS dims from `dim` on of a row that all warps have left."""
    tops, masses, values = (), (), ()
    for w in gl.static_range(WARPS):
        top, mass = load_floats(address + row * 8, WARPS * R * row_pitch(D) + w * (R * 8))
        tops += (top,)
        masses += (mass,)
        at = address + row * row_pitch(D) + dim * 4
        if DIMS == 2:
            values += (load_floats(at, w * (R * row_pitch(D))),)
        else:
            values += (recast(load_four(at, w * (R * row_pitch(D))), gl.float32),)
    return weighted(tops, masses, values)


@gluon.jit
def weighted(tops, masses, values):
    """Return the maximum, the sum of weights and y of all parts."""
    top = tops[0]
    for n in gl.static_range(1, len(tops)):
        top = gl.maximum(top, tops[n])
    level = level_of(top)
    zero = gl.zeros_like(top)
    total, y = zero, (zero,) * len(values[0])
    for n in gl.static_range(len(tops)):
        weight, more = gl.exp2(tops[n] - level), ()
        total = gl.fma(weight, masses[n], total)
        for d in gl.static_range(len(y)):
            more += (gl.fma(weight, values[n][d], y[d]),)
        y = more
    return top, total, y


@gluon.jit
def leave_share(
    partial, share, row, dim, found, here, R: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr
):  # fmt: skip
    """Store what `add_warps` found in global memory: SPLITS x R x D values, then SPLITS x R pairs of the other two."""
    top, total, y = found
    store_words(partial + (share * R + row) * D + dim, recast(y, gl.uint32), here, 0)
    store_words(partial + SPLITS * R * D + (share * R + row) * 2, recast((top, total), gl.uint32), here & (dim == 0), 0)


@gluon.jit
def add_shares(
    partial, row, dim, here, lowest, shares, DIMS: gl.constexpr, R: gl.constexpr, D: gl.constexpr, SPLITS: gl.constexpr
):  # fmt: skip
    """Return the sum of weights and DIMS y from `dim` on of a row, of the `shares` shares from `lowest` on.

    partial: see `leave_share`. Eight shares are loaded at once; they are counted from 0, whichever of them are there.
    """
    zero = dim * 0.0
    top, total, y = zero + float("-inf"), zero, (zero,) * DIMS
    for first in range(0, gl.where(lowest == 0, shares, SPLITS), AT_ONCE):
        tops, masses, values = (top,), (total,), (y,)
        for n in gl.static_range(AT_ONCE):
            share = first + n
            present = here & (share < SPLITS) & ((share - lowest + SPLITS) % SPLITS < shares)
            peak, mass = load_pair(partial + SPLITS * R * D + (share * R + row) * 2, present, 0, True)
            tops += (gl.where(present, peak, float("-inf")),)
            masses += (mass,)
            at = partial + (share * R + row) * D + dim
            if DIMS == 2:
                values += (load_pair(at, present, 0, True),)
            else:
                values += (recast(load_global(at, present), gl.float32),)
        top, total, y = weighted(tops, masses, values)
    return total, y
