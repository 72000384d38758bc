"""Attention over the filled part of the cache: rotation, append, scores and values in one launch.

A program serves one text, one key head, up to 8 of its (token, query head) rows, and one of SPLITS shares of the
cache. A warp has 16 positions, and a program's eight warps a tile of 128; SPAN tiles in a row belong to one share, the
next SPAN to the next. Where the text ends is read on the device, so the grid never changes (CUDA graphs) and the cost
follows the filled part: programs without a tile leave at once.

- A layer waits for this kernel, and with a short text it has little to read: what counts is what happens after the wait
  for the new queries, keys and values. Keys and values are operands of the tensor cores as they come from memory
  (`heads`); a warp takes softmax of its own positions, and warps and programs meet only at the end (`shares`).
- Under programmatic dependent launch, the first tile is loaded into registers before the wait, which is where the next
  tiles follow as soon as one is used. And a rehearsal runs then: the same code once more, with the old keys and
  without new ones, stores nothing, and leaves code, rotations and gains in the caches. So positions, rotations and the
  old cache are read before the wait: between whoever wrote them and the layers must stand a kernel that lets nobody
  start early (`entry.embed`).
- New keys are rotated by every program that needs them, and stored by one; nobody reads what another writes in
  the same launch, but for the partial results behind the ticket.
- A row's bits depend on its own position alone: tiles and shares lie at fixed positions, and what a row does not see
  adds exactly nothing, so that verified tokens equal decoded ones.

Online softmax: arXiv 1805.02867; splitting over the keys: Flash-Decoding, arXiv 2311.01282; RoPE: 2104.09864.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import launch
from fastgen.kernels.fragments import barrier, lanes, statement, swapped_float, warp_barrier
from fastgen.kernels.heads import (
    add_values,
    heads_lines,
    key_pitch,
    load_heads,
    load_keys,
    load_new_keys,
    load_queries,
    load_values,
    of_row,
    pair,
    place,
    products,
    query_bytes,
    store_keys,
    store_values,
    turn_heads,
)
from fastgen.kernels.masked import store_words
from fastgen.kernels.ring import ring_memory
from fastgen.kernels.shares import add_shares, add_warps, dims_of, exchange_lines, leave_rows, leave_share, level_of

ROWS = 8
"""Rows of a program, the smallest tile of the tensor cores."""

WARPS = 8
"""Warps of a program; they are the order of every sum over positions."""

SPAN = 2
"""Tiles that one program takes before another shares in."""

REHEARSALS = 1
"""How often a program goes through its code while it waits for the kernel ahead."""

REGISTERS = 160
"""A thread; what is left lets the kernels ahead and behind have programs beside these."""


def choose_rows(rows: int, tokens: int, d: int, memory: int) -> int:
    """Return how many of a key head's rows a program serves, a power of two, fewer where `memory` KiB are short."""
    chosen = min(ROWS, launch.next_power_of_two(rows))
    while chosen > 1 and _lines(chosen, tokens, d) * 512 >= memory << 10:
        chosen //= 2
    return chosen


def _lines(rows: int, tokens: int, d: int) -> int:
    """Return the lines of 512 bytes of shared memory that a program needs; the ticket is behind them."""
    return int(exchange_lines(WARPS, rows, d) + heads_lines(rows, launch.next_power_of_two(tokens), d))


@torch.library.custom_op("fastgen::attend", mutates_args=("k_cache", "v_cache"))
def attend(
    qkv: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    rope: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    window: int,
) -> Tensor:
    """Return [B, T, H d]; see `reference.attend`.

    Args:
        qkv: [B, T, (H + 2K) d] fp16 or bf16, d a multiple of 16.
        k_cache, v_cache: [B, K, S, d] of the same dtype, contiguous.
        positions: [B, T] int64, consecutive in a row.
        rope: [B, T, d] float32.
        q_norm, k_norm: [d], both or neither.
    """
    B, T, width = qkv.shape
    K, S, d = k_cache.shape[1:]
    H = width // d - 2 * K
    splits, rows = launch.split_count(K), choose_rows(T * (H // K), T, d, launch.shared_memory(qkv.device))
    out = torch.empty(B, T, H * d, dtype=qkv.dtype, device=qkv.device)
    cells = B * K * triton.cdiv(T * (H // K), rows)
    assert cells <= launch.MAX_CELLS, f"{cells} groups of rows: expected at most {launch.MAX_CELLS}"
    partial = torch.empty(cells * splits * rows * (d + 2), dtype=torch.float32, device=qkv.device)
    dependent = launch.dependent_launch(qkv.device)
    attend_kernel[(cells, splits)](
        qkv.contiguous(), k_cache, v_cache, positions.contiguous(), rope.contiguous(), q_norm, k_norm,
        out, partial, launch.workspace(qkv.device), eps, scale * 1.4426950408889634, window,
        REHEARSALS if dependent else 0, T, S, K=K, G=H // K, D=d, R=rows, N=launch.next_power_of_two(T), SPLITS=splits,
        SPAN=SPAN, PDL=bool(dependent), WARPS=WARPS, num_warps=WARPS,
        maxnreg=REGISTERS if dependent else 255, **dependent,
    )  # fmt: skip
    return out


@attend.register_fake
def _(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, rope: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, scale: float, window: int,
) -> Tensor:  # fmt: skip
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width - 2 * k_cache.shape[1] * k_cache.shape[3])


@gluon.jit(do_not_specialize=["window", "rehearsals", "T", "S"])
def attend_kernel(  # noqa: PLR0912, PLR0915
    qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, out, partial, tickets, eps, scale, window, rehearsals, T, S,
    K: gl.constexpr, G: gl.constexpr, D: gl.constexpr, R: gl.constexpr, N: gl.constexpr, SPLITS: gl.constexpr,
    SPAN: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Grid (B K groups, SPLITS); partial: see `shares.add_shares`, for each cell; tickets are 0.

    R is the number of rows of a program, a power of two, see `choose_rows`; N is T, or the power of two above it.
    """
    CHUNKS: gl.constexpr = (D + 63) // 64
    DIMS: gl.constexpr = dims_of(WARPS, R, D)
    STRIDE: gl.constexpr = (G * K + 2 * K) * D
    TILE: gl.constexpr = 16 * WARPS
    BF16: gl.constexpr = qkv.dtype.element_ty == gl.bfloat16
    L: gl.constexpr = lanes(WARPS)
    cell, share = gl.program_id(0), gl.program_id(1)
    groups = 1 if N * G <= R else gl.cdiv(T * G, R)
    group, head, text = cell % groups, (cell // groups) % K, cell // (groups * K)
    begin = gl.load(positions + text * T).to(gl.int32)  # position of the first new token
    lowest = gl.where(window > 0, gl.maximum(begin - window + 1, 0), 0) // TILE
    last = (begin + T - 1) // TILE
    origin = lowest // SPAN
    shares = gl.minimum(last // SPAN - origin + 1, SPLITS)
    first = gl.maximum((origin + (share - origin % SPLITS + SPLITS) % SPLITS) * SPAN, lowest)
    if PDL:
        statement("griddepcontrol.launch_dependents;")
    if first > last:
        return

    memory, address = ring_memory(exchange_lines(WARPS, R, D) + heads_lines(R, N, D))
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, L))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, L))[None, :] + warp * 0
    g, t = lane // 4, lane % 4
    zero, none = lane * 0.0, (lane * 0).to(gl.uint32)
    nothing = (none, none, none, none)
    cache = (text * K + head).to(gl.int64) * S * D
    source = qkv + text.to(gl.int64) * T * STRIDE
    key_at, value_at = 16 * warp + g, 16 * warp + 2 * t  # in a tile
    cached_key, cached_value = k_cache + cache + key_at * D + 8 * t, v_cache + cache + value_at * D + 8 * g
    new_value = source + (G * K + K + head) * D + 8 * g
    turned_at = address + exchange_lines(WARPS, R, D) * 512
    position = begin + gl.minimum(group * R + g, T * G - 1) // G  # of row g
    keys = load_keys(
        ((nothing,) * (2 * CHUNKS),) * 2, cached_key + first * (TILE * D), begin - first * TILE - key_at, t, D
    )  # fmt: skip
    at = begin - first * TILE - value_at
    values = load_values((nothing,) * (4 * CHUNKS), cached_value + first * (TILE * D), 0, at, g, D, D)

    for attempt in range(rehearsals + 1):
        live = attempt == rehearsals
        end, fresh = gl.where(live, last, first), gl.where(live, T, 0)  # a rehearsal sees one tile, and nothing new
        barrier()
        if PDL:  # noqa: SIM102  (decided when it is compiled)
            if live:
                statement("griddepcontrol.wait;")
        heads = load_heads(
            warp, lane, (R, group * R, T * G - 1), T, source + head * (G * D), (G * K - G * head + head) * D,
            rope + text * T * D, (q_norm, k_norm), live, G, N, STRIDE, D, WARPS,
        )  # fmt: skip
        warp_barrier()  # the assembler would load these first, but those are needed first
        values = load_values(values, new_value - at * STRIDE, at, at + fresh, g, STRIDE, D)
        turn_heads(heads, turned_at, warp, lane, eps, R, N, q_norm is not None, D, BF16, WARPS)
        barrier()
        queries = load_queries(turned_at, g, t, R, D)

        top, total = zero + float("-inf"), zero
        y = ((zero, zero, zero, zero),) * (4 * CHUNKS)
        tile = first
        while tile <= end:
            start = begin - tile * TILE
            appends = start < TILE
            if appends:
                low, high = start - key_at, start - key_at + fresh
                new_key = turned_at + query_bytes(R, D) - low * key_pitch(D)
                keys = load_new_keys(keys, new_key, low, high, t, D)
                store_keys(
                    keys, cached_key + tile * (TILE * D), low, gl.where(group == 0, high, low), t, D
                )  # fmt: skip
            scores = products(queries, keys, BF16)
            following = next_tile(tile, SPAN, SPLITS)
            if following <= end:
                low = begin - following * TILE - key_at
                keys = load_keys(keys, cached_key + following * (TILE * D), low, t, D)
            limit = position - tile * TILE - value_at
            top, total, y, weights = take_scores(top, total, y, scores, limit, window, scale, t, BF16)
            y = add_values(y, weights, values, BF16)
            if appends:
                low = start - value_at
                high = gl.where(group == 0, low + fresh, low)
                store_values(values, cached_value + tile * (TILE * D), low, high, g, D)
            if following <= end:
                low = begin - following * TILE - value_at
                values = load_values(values, cached_value + following * (TILE * D), 0, low, g, D, D)
                values = load_values(values, new_value - low * STRIDE, low, low + fresh, g, STRIDE, D)
            tile = following

        total += swapped_float(total, 1)
        total += swapped_float(total, 2)
        leave_rows(address, warp, lane, top, total, y, R, D, WARPS)
        barrier()
        for n in gl.static_range((R * (D // DIMS) + 32 * WARPS - 1) // (32 * WARPS)):
            unit = n * (32 * WARPS) + warp * 32 + lane
            row, dim = unit // (D // DIMS), unit % (D // DIMS) * DIMS
            here = live & (group * R + row < T * G) & (row < R)
            found = add_warps(address, gl.where(row < R, row, 0), dim, DIMS, R, D, WARPS)
            if shares == 1:
                store_output(out, text, head, group * R + row, dim, found[1], found[2], here, T, K, G, D, BF16)
            else:
                base = partial + cell.to(gl.int64) * (SPLITS * R * (D + 2))
                leave_share(base, share, row, dim, found, here, R, D, SPLITS)

    if shares > 1:
        barrier()
        if gl.atomic_add(tickets + cell, 1, sem="acq_rel") == shares - 1:
            gl.store(tickets + cell, 0)
            for n in gl.static_range((R * (D // DIMS) + 32 * WARPS - 1) // (32 * WARPS)):
                unit = n * (32 * WARPS) + warp * 32 + lane
                row, dim = unit // (D // DIMS), unit % (D // DIMS) * DIMS
                here = (group * R + row < T * G) & (row < R)
                base = partial + cell.to(gl.int64) * (SPLITS * R * (D + 2))
                mass, sums = add_shares(base, row, dim, here, origin % SPLITS, shares, DIMS, R, D, SPLITS)
                store_output(out, text, head, group * R + row, dim, mass, sums, here, T, K, G, D, BF16)
    memory._keep_alive()


@gluon.jit
def take_scores(top, total, y, scores, limit, window, scale, t, BF16: gl.constexpr):
    """Return what a lane has of its rows, relative to a maximum that counts a tile's scores too, and their weights.

    top, total: of row g, the sum of the lane's own positions; y: see `heads.add_values`; scores: see `heads.products`;
    limit: the last position that row g sees, relative to 2t; weights: words for either eight positions.
    """
    floor = gl.where(window > 0, limit - window, -1)
    seen = ()
    for n in gl.static_range(4):
        visible = (limit >= place(n)) & (floor < place(n))
        seen += (gl.where(visible, scores[n] * scale, float("-inf")),)
    higher = gl.maximum(gl.maximum(seen[0], seen[1]), gl.maximum(seen[2], seen[3]))
    higher = gl.maximum(higher, swapped_float(higher, 1))
    higher = gl.maximum(top, gl.maximum(higher, swapped_float(higher, 2)))
    level = level_of(higher)
    w = (gl.exp2(seen[0] - level), gl.exp2(seen[1] - level), gl.exp2(seen[2] - level), gl.exp2(seen[3] - level))
    kept = gl.exp2(top - level)
    total = gl.fma(total, kept, (w[0] + w[1]) + (w[2] + w[3]))
    a, b = of_row(kept, 8 * t), of_row(kept, 8 * t + 4)  # y has rows 2t, 2t + 1
    fours = ()
    for n in gl.static_range(len(y)):
        four = y[n]
        fours += ((four[0] * a, four[1] * b, four[2] * a, four[3] * b),)
    return higher, total, fours, (pair(w[0], w[1], BF16), pair(w[2], w[3], BF16))


@gluon.jit
def next_tile(tile, SPAN: gl.constexpr, SPLITS: gl.constexpr):
    """Return the tile after one in the same share."""
    return gl.where((tile + 1) % SPAN == 0, tile + 1 + SPAN * (SPLITS - 1), tile + 1)


@gluon.jit
def store_output(
    out, text, head, row, dim, mass, y, here, T, K: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BF16: gl.constexpr
):  # fmt: skip
    """Store neighbouring dims of a row of a text's key head, divided by the sum of weights."""
    words = ()
    for n in gl.static_range(len(y) // 2):
        words += (pair(y[2 * n] / mass, y[2 * n + 1] / mass, BF16),)
    at = out + ((text * T + row // G).to(gl.int64) * (G * K) + head * G + row % G) * D + dim
    store_words(at, words, here, 0)
