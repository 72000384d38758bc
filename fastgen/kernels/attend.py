"""Attention over the filled part of the cache: rotation, append, scores and values in one launch.

A program serves one text, one key head, up to 16 of its (token, query head) rows, and one of SPLITS shares of the
cache: the tiles of TILE positions whose number leaves the program's share when divided by SPLITS. Where the text
ends is read on the device, so the grid never changes (CUDA graphs) and the cost follows the filled part: programs
without a tile leave at once. The last program of a head to finish (a ticket decides) adds up the shares.

- New keys are rotated by every program that needs them, and stored by one; nobody reads what another writes in
  the same launch, but for the partial results behind the ticket.
- A row's bits depend on its own position alone: tiles lie at fixed positions, shares are added in fixed order, and
  every program has 16 rows whatever the number of tokens, so that verified tokens equal decoded ones.
- The head is two halves of d / 2 (padded to a power of two), because the rotation pairs j with j + d / 2; scores
  are the sum of two products.
- Under programmatic dependent launch, positions, rotations and the first tile of the cache are read before the wait:
  between whoever wrote them and the layers must stand a kernel that lets nobody start early (`entry.embed`).

Online softmax: arXiv 1805.02867; splitting over the keys: Flash-Decoding, arXiv 2311.01282; RoPE: 2104.09864.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fastgen.kernels import launch

ROWS = 16  # rows of a program, the smallest tile of the tensor cores
TILE = 64  # positions
WARPS = 8
REGISTERS = 168  # a thread; what is left lets the next kernel copy its first weights meanwhile


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
        qkv: [B, T, (H + 2K) d] fp16 or bf16.
        k_cache, v_cache: [B, K, S, d] of the same dtype, contiguous.
        positions: [B, T] int64, consecutive in a row.
        rope: [B, T, d] float32.
        q_norm, k_norm: [d], both or neither.
    """
    B, T, width = qkv.shape
    K, S, d = k_cache.shape[1:]
    H = width // d - 2 * K
    splits, groups = launch.split_count(K), triton.cdiv(T * (H // K), ROWS)
    out = torch.empty(B, T, H * d, dtype=qkv.dtype, device=qkv.device)
    cells = B * K * groups
    partial = torch.empty(cells * splits * ROWS * (d + 2), dtype=torch.float32, device=qkv.device)
    dependent = launch.dependent_launch(qkv.device)
    attend_kernel[(cells, splits)](
        qkv.contiguous(), k_cache, v_cache, positions.contiguous(), rope.contiguous(), q_norm, k_norm,
        out, partial, launch.workspace(qkv.device), eps, scale * 1.4426950408889634, window, T, S,
        K=K, G=H // K, D=d, HALF=max(16, launch.next_power_of_two(d // 2)), ROWS=ROWS, TILE=TILE,
        SPLITS=splits, NORM=q_norm is not None, PDL=bool(dependent), num_warps=WARPS, num_stages=1,
        maxnreg=REGISTERS, **dependent,
    )  # fmt: skip
    return out


@attend.register_fake
def _(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, rope: Tensor, q_norm: Tensor | None,
    k_norm: Tensor | None, eps: float, scale: float, window: int,
) -> Tensor:  # fmt: skip
    B, T, width = qkv.shape
    return qkv.new_empty(B, T, width - 2 * k_cache.shape[1] * k_cache.shape[3])


@triton.jit
def attend_kernel(  # noqa: PLR0915
    qkv, k_cache, v_cache, positions, rope, q_norm, k_norm, out, partial, tickets, eps, scale, window, T, S,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SPLITS: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (B K groups, SPLITS); partial holds SPLITS x ROWS x (D values, maximum, sum) fp32 a cell; tickets are 0."""
    cell, share = tl.program_id(0), tl.program_id(1)
    groups = tl.cdiv(T * G, ROWS)
    group, head, text = cell % groups, (cell // groups) % K, cell // (groups * K)
    begin = tl.load(positions + text * T).to(tl.int32)  # position of the first new token
    lowest = tl.maximum(begin - window + 1, 0) // TILE if window > 0 else 0
    last = (begin + T - 1) // TILE
    tile = lowest + (share - lowest % SPLITS + SPLITS) % SPLITS
    cache = (text * K + head).to(tl.int64) * S * D
    if PDL:
        gdc_launch_dependents()
    if tile > last:
        return
    half = tl.arange(0, HALF)
    row = group * ROWS + tl.arange(0, ROWS)
    row_token = tl.minimum(row // G, T - 1)
    turn = rope + (text * T + row_token)[:, None] * D + half[None, :]
    in_half = (half < D // 2)[None, :]
    cos = tl.load(turn, mask=in_half, other=0.0)
    sin = tl.load(turn + D // 2, mask=in_half, other=0.0)
    next_k1, next_k2, next_v1, next_v2 = _cached_tile(k_cache, v_cache, cache, tile, begin, half, D, TILE)
    if PDL:
        gdc_wait()

    stride = (G * K + 2 * K) * D
    source = qkv + text.to(tl.int64) * T * stride
    q_at = source + (row_token * stride + (head * G + row % G) * D)[:, None] + half[None, :]
    q1, q2 = _turned_head(q_at, cos, sin, (row < T * G)[:, None] & in_half, q_norm, half, eps, D, NORM)
    position = begin + row_token
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    y1 = tl.zeros([ROWS, HALF], tl.float32)
    y2 = tl.zeros([ROWS, HALF], tl.float32)
    for t in range(tile, last + 1, SPLITS):
        key = t * TILE + tl.arange(0, TILE)
        at = cache + key.to(tl.int64)[:, None] * D + half[None, :]
        k1, k2, v1, v2 = next_k1, next_k2, next_v1, next_v2
        next_k1, next_k2, next_v1, next_v2 = _cached_tile(k_cache, v_cache, cache, t + SPLITS, begin, half, D, TILE)
        if t * TILE + TILE > begin:
            token = tl.minimum(tl.maximum(key - begin, 0), T - 1)
            new = ((key >= begin) & (key < begin + T))[:, None] & in_half
            key_turn = rope + (text * T + token)[:, None] * D + half[None, :]
            key_cos = tl.load(key_turn, mask=new, other=0.0)
            key_sin = tl.load(key_turn + D // 2, mask=new, other=0.0)
            k_at = source + (token * stride + (K * G + head) * D)[:, None] + half[None, :]
            n1, n2 = _turned_head(k_at, key_cos, key_sin, new, k_norm, half, eps, D, NORM)
            m1 = tl.load(k_at + K * D, mask=new, other=0.0)
            m2 = tl.load(k_at + K * D + D // 2, mask=new, other=0.0)
            store = new & (group == 0)
            tl.store(k_cache + at, n1, mask=store)
            tl.store(k_cache + at + D // 2, n2, mask=store)
            tl.store(v_cache + at, m1, mask=store)
            tl.store(v_cache + at + D // 2, m2, mask=store)
            k1, k2 = tl.where(new, n1, k1), tl.where(new, n2, k2)
            v1, v2 = tl.where(new, m1, v1), tl.where(new, m2, v2)
        scores = tl.dot(q1, tl.trans(k1), input_precision="ieee")
        scores = tl.dot(q2, tl.trans(k2), scores, input_precision="ieee") * scale
        visible = key[None, :] <= position[:, None]
        if window > 0:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        kept = tl.exp2(top - level)
        sums = sums * kept + tl.sum(weights, axis=1)
        weights = weights.to(v1.dtype)
        y1 = tl.dot(weights, v1, y1 * kept[:, None], input_precision="ieee")
        y2 = tl.dot(weights, v2, y2 * kept[:, None], input_precision="ieee")
        top = higher

    out_at = out + (text * T + row_token).to(tl.int64) * (G * K * D) + (head * G + row % G) * D
    out_at = out_at[:, None] + half[None, :]
    mine = (row < T * G)[:, None] & in_half
    shares = tl.minimum(last - lowest + 1, SPLITS)
    if shares == 1:
        tl.store(out_at, (y1 / sums[:, None]).to(out.dtype.element_ty), mask=mine)
        tl.store(out_at + D // 2, (y2 / sums[:, None]).to(out.dtype.element_ty), mask=mine)
        return
    base = partial + cell.to(tl.int64) * SPLITS * ROWS * (D + 2)
    slot = base + (share * ROWS + tl.arange(0, ROWS)) * (D + 2)
    tl.store(slot[:, None] + half[None, :], y1, mask=mine)
    tl.store(slot[:, None] + D // 2 + half[None, :], y2, mask=mine)
    tl.store(slot + D, top)
    tl.store(slot + D + 1, sums)
    tl.debug_barrier()
    if tl.atomic_add(tickets + cell, 1, sem="acq_rel") != shares - 1:
        return
    tl.store(tickets + cell, 0)
    _add_shares(base, out_at, mine, half, lowest, shares, D, HALF, ROWS, SPLITS)


@triton.jit
def _cached_tile(k_cache, v_cache, cache, tile, begin, half, D: tl.constexpr, TILE: tl.constexpr):
    """Load the halves of a tile's keys and values that stood in the cache before this launch, 0 elsewhere."""
    key = tile * TILE + tl.arange(0, TILE)
    at = cache + key.to(tl.int64)[:, None] * D + half[None, :]
    old = (key < begin)[:, None] & (half < D // 2)[None, :]
    return (
        tl.load(k_cache + at, mask=old, other=0.0), tl.load(k_cache + at + D // 2, mask=old, other=0.0),
        tl.load(v_cache + at, mask=old, other=0.0), tl.load(v_cache + at + D // 2, mask=old, other=0.0),
    )  # fmt: skip


@triton.jit
def _turned_head(at, cos, sin, here, norm, half, eps, D: tl.constexpr, NORM: tl.constexpr):
    """Load the two halves of some heads, normalize (NORM) and rotate them; rounded where the reference rounds."""
    a = tl.load(at, mask=here, other=0.0)
    b = tl.load(at + D // 2, mask=here, other=0.0)
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM:
        factor = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / D + eps)[:, None]
        gain_a = tl.load(norm + half, mask=half < D // 2, other=0.0).to(tl.float32)[None, :]
        gain_b = tl.load(norm + half + D // 2, mask=half < D // 2, other=0.0).to(tl.float32)[None, :]
        a, b = (a * factor * gain_a).to(dtype).to(tl.float32), (b * factor * gain_b).to(dtype).to(tl.float32)
    return (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)


@triton.jit
def _add_shares(
    base, out_at, mine, half, lowest, shares, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Add the partial results of a cell in the order of their shares and store the output.

    Four shares are loaded at a time; `.cg` because an L1 may hold what another layer left at these addresses.
    """
    row = tl.arange(0, ROWS)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    y1 = tl.zeros([ROWS, HALF], tl.float32)
    y2 = tl.zeros([ROWS, HALF], tl.float32)
    end = shares if lowest % SPLITS == 0 else SPLITS  # the shares present are then the first ones
    for start in range(0, end, 4):
        for offset in tl.static_range(4):
            share = start + offset
            here = (share < SPLITS) & ((share - lowest % SPLITS + SPLITS) % SPLITS < shares)
            slot = base + (share * ROWS + row) * (D + 2)
            value = slot[:, None] + half[None, :]
            a1 = tl.load(value, mask=mine & here, other=0.0, cache_modifier=".cg")
            a2 = tl.load(value + D // 2, mask=mine & here, other=0.0, cache_modifier=".cg")
            peak = tl.load(slot + D, mask=here, other=float("-inf"), cache_modifier=".cg")
            mass = tl.load(slot + D + 1, mask=here, other=0.0, cache_modifier=".cg")
            higher = tl.maximum(top, peak)
            level = tl.where(higher == float("-inf"), 0.0, higher)
            kept, weight = tl.exp2(top - level), tl.exp2(peak - level)
            sums = sums * kept + weight * mass
            y1 = y1 * kept[:, None] + weight[:, None] * a1
            y2 = y2 * kept[:, None] + weight[:, None] * a2
            top = higher
    tl.store(out_at, (y1 / sums[:, None]).to(out_at.dtype.element_ty), mask=mine)
    tl.store(out_at + D // 2, (y2 / sums[:, None]).to(out_at.dtype.element_ty), mask=mine)
