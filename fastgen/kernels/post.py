"""How a product sends its numbers to all ranks from its epilogue: as words of `exchange`, for `Exchange.receive`."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels import exchange

CAPACITY, TILE = gl.constexpr(exchange.CAPACITY), gl.constexpr(exchange.TILE)


@gluon.jit
def addresses(boxes, WORLD: gl.constexpr):
    """Return the addresses of the ranks' boxes, constants that may be read before the wait."""
    theirs = ()
    for r in gl.static_range(WORLD):
        theirs += (gl.load(boxes + r),)
    return theirs


@gluon.jit
def coming_call(calls, at, here):
    """Return the number of the sum that comes next, for numbers [..] at these places."""
    return gl.load(calls + at // TILE, mask=here, other=0) + 1


@gluon.jit
def post(y, call, at, here, rank, theirs):
    """Write y [..] fp32, where `here`, into every rank's box, as `exchange.send` does."""
    word = (call.to(gl.int64) << 32) | (y.to(gl.int32, bitcast=True).to(gl.int64) & 0xFFFFFFFF)
    slot = ((call & 1) * len(theirs) + rank) * CAPACITY + at
    for r in gl.static_range(len(theirs)):
        gl.store(theirs[r].to(gl.pointer_type(gl.int64)) + slot, word, mask=here, cache_modifier=".wt")
