"""The loop that four stages share: stream a weight matrix once, multiply it with 1 to 16 tokens.

For few tokens the product of a linear is bound by reading its weights, so everything here serves one end: that
memory never idles, not within a kernel and not between two.

- The grid is as large as the GPU holds at once. A program takes every G-th block of ROWS rows, and row blocks and
  tiles of K are one flat loop, so the copies into shared memory (`cp.async`, Triton's pipeline, STAGES deep) run on
  across blocks.
- Under programmatic dependent launch the first tiles of weights are copied *before* the program waits for the
  kernel ahead of it. The pipeliner puts the first copies in front of the loop, and the wait stands inside the
  loop's first round. The activations are what the kernel ahead wrote, so they may not run ahead with the
  weights: the pipeliner leaves a branch as it is, hence the one, always taken, that holds the wait and their
  load (EARLY). Triton must not know that it is always taken: `tokens` is not to be specialized. They are loaded a
  tile ahead, as words of two: unpacking right behind the load would wait for it.
- A tile of K is cut into SPLITS parts, one a warp, as the batch of a batched `tl.dot`: mma.m16n8k16 with the tokens
  as its 8 columns (16 from 9 tokens on; fewer are repeated). A product's bits therefore depend on SPLITS and BLOCK
  alone, not on the number of tokens or on ROWS: a token that is verified among others gives what it gives alone.
- RMSNorm is applied to the sums: sum(w g x) * scale, with the squares summed along the way. fp16 could overflow
  there, so it scales first, for one more pass over x. The order in which the squares are summed follows the
  layout, and so the number of tokens; fp64, in which squares of bf16 are exact, makes their sum the same.

Letters: T tokens, N rows of the output, K width of the input; B row block, G programs.
Sources: programmatic dependent launch, CUDA C++ Programming Guide, "Programmatic Dependent Launch and
Synchronization"; PTX ISA, griddepcontrol, mma.m16n8k16. RMSNorm: arXiv 1910.07467.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def stream_product(  # noqa: PLR0912, PLR0915
    x, norm, weight, tokens, n, eps, finish: tl.constexpr, extra,
    K: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    PAIRED: tl.constexpr, NORM: tl.constexpr, SCALE_FIRST: tl.constexpr, PDL: tl.constexpr, EARLY: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Call finish(y, block, columns, tokens, n, extra) with every block of y = weight @ rms_norm(x).

    x [tokens, K], norm [K] or None, weight [n, K]; PAIRED: weight [2n, K], and a block holds ROWS / 2 rows of the
    first half, then the same rows of the second. y [ROWS, COLUMNS] fp32; column c is token c where c < tokens.
    TOKENS is `tokens` rounded up to a power of two, COLUMNS at least 8.
    """
    TILE: tl.constexpr = SPLITS * BLOCK
    TILES: tl.constexpr = (K + TILE - 1) // TILE
    COLUMNS: tl.constexpr = max(TOKENS, 8)
    # Columns beyond the tokens repeat them: in registers where there is arithmetic to save, else in the load.
    LOADED: tl.constexpr = TOKENS if NORM else COLUMNS
    SPAN: tl.constexpr = ROWS // 2 if PAIRED else ROWS
    HOISTED: tl.constexpr = PDL and EARLY and not SCALE_FIRST and K % 2 == 0
    first, step = tl.program_id(0), tl.num_programs(0)
    rounds = ((tl.cdiv(n, SPAN) - first + step - 1) // step) * TILES
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    token = tl.arange(0, LOADED) % TOKENS
    k = tl.arange(0, TILE)
    split_k = tl.arange(0, SPLITS)[:, None, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
    if PDL:
        gdc_launch_dependents()
        if not HOISTED:
            gdc_wait()
    if SCALE_FIRST:
        scale = rms_scale(x, token, tokens, eps, K, TILE, TOKENS)
    total = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([TOKENS, TILE // 8], tl.float64)
    factor = tl.zeros([TOKENS], tl.float32)
    ahead = tl.zeros([LOADED, TILE // 2], tl.int32)
    for i in tl.range(0, rounds, num_stages=STAGES):
        tile = i % TILES
        block = first + (i // TILES) * step
        start = tile * TILE
        rows = tl.minimum(block * SPAN + row % SPAN, n - 1) + (row // SPAN) * n
        w_at = weight + rows.to(tl.int64)[None, :, None] * K + (start + split_k)
        w = tl.load(w_at, mask=split_k < K - start, other=0.0, eviction_policy="evict_first")
        if HOISTED:
            if tokens > 0:
                if i == 0:
                    gdc_wait()
                    ahead = _load_words(x, token, tokens, 0, K, TILE)
                part = _unpack(ahead, x.dtype.element_ty)
                ahead = _load_words(x, token, tokens, ((i + 1) % TILES) * TILE, K, TILE)
            else:
                part = tl.zeros([LOADED, TILE], x.dtype.element_ty)
        else:
            here = (token < tokens)[:, None] & (k < K - start)[None, :]
            part = tl.load(x + token[:, None] * K + (start + k)[None, :], mask=here, other=0.0)
        if NORM:
            wide = part.to(tl.float32)
            if SCALE_FIRST:
                wide *= scale[:, None]
            elif i < TILES:
                squares += tl.sum(tl.reshape((wide * wide).to(tl.float64), [TOKENS, TILE // 8, 8]), axis=2)
            gain = tl.load(norm + start + k, mask=k < K - start, other=0.0).to(tl.float32)
            part = (wide * gain[None, :]).to(part.dtype)
        operand = tl.permute(tl.reshape(part, [LOADED, SPLITS, BLOCK]), (1, 2, 0))
        if LOADED < COLUMNS:
            operand = tl.broadcast_to(operand[:, :, None, :], [SPLITS, BLOCK, COLUMNS // LOADED, LOADED])
            operand = tl.reshape(operand, [SPLITS, BLOCK, COLUMNS])
        total = tl.dot(w, operand, total, input_precision="ieee")
        if tile == TILES - 1:
            y = tl.sum(total, axis=0)
            if NORM and not SCALE_FIRST:
                if i < TILES:
                    factor = tl.rsqrt((tl.sum(squares, axis=1) / K).to(tl.float32) + eps)
                scale = factor
                if TOKENS < COLUMNS:
                    scale = tl.broadcast_to(scale[None, :], [COLUMNS // TOKENS, TOKENS])
                    scale = tl.reshape(scale, [COLUMNS])
                y *= scale[None, :]
            finish(y, block, column, tokens, n, extra)
            total = tl.zeros([SPLITS, ROWS, COLUMNS], tl.float32)


@triton.jit
def _load_words(x, token, tokens, start, K: tl.constexpr, TILE: tl.constexpr):
    """Load x[token, start : start + TILE] as words of two values; K is even."""
    pair = start // 2 + tl.arange(0, TILE // 2)
    here = (token < tokens)[:, None] & (pair < K // 2)[None, :]
    at = x.to(tl.pointer_type(tl.int32)) + token[:, None] * (K // 2) + pair[None, :]
    return tl.load(at, mask=here, other=0)


@triton.jit
def _unpack(words, dtype: tl.constexpr):
    low = (words & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = (words >> 16).to(tl.int16).to(dtype, bitcast=True)
    return tl.reshape(tl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@triton.jit
def rms_scale(x, token, tokens, eps, K: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """Return 1 / rms of every row of x [tokens, K] as fp32 [TOKENS]."""
    k = tl.arange(0, TILE)
    squares = tl.zeros([TOKENS, TILE // 8], tl.float64)
    for start in range(0, K, TILE):
        here = (token < tokens)[:, None] & (k < K - start)[None, :]
        wide = tl.load(x + token[:, None] * K + (start + k)[None, :], mask=here, other=0.0).to(tl.float32)
        squares += tl.sum(tl.reshape((wide * wide).to(tl.float64), [TOKENS, TILE // 8, 8]), axis=2)
    return tl.rsqrt((tl.sum(squares, axis=1) / K).to(tl.float32) + eps)


@triton.jit
def store_rows(y, block, column, tokens, n, extra):
    """Store y [ROWS, COLUMNS] plus a bias [n] or None into out [tokens, n], with extra = (out, bias)."""
    out, bias = extra
    rows = block * y.shape[0] + tl.arange(0, y.shape[0])
    if bias is not None:
        y += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
    here = (rows < n)[:, None] & (column < tokens)[None, :]
    tl.store(out + column[None, :].to(tl.int64) * n + rows[:, None], y.to(out.dtype.element_ty), mask=here)
