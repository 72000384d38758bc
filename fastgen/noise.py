"""Random numbers without a generator: noise is a hash of the place where it is used.

A generator has a state, and what it gives depends on the order of calls, on the device and on whether the graph
was compiled. Here every number is a pure function of a key and a token id, so the same seed gives the same noise
eager and compiled, on CPU and GPU, for one position or sixteen at once, for the slice of the vocabulary that a
tensor-parallel rank holds, and in a draft model as in its target.

The hash is 32-bit integer arithmetic, done in int64 with masks because torch offers little for uint32. A kernel
would do the same in uint32 and answer to the same golden values, in `tests/test_noise.py`. It is no defence
against an adversary; it makes neighbouring keys independent.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MASK = 0xFFFF_FFFF
LANES = (0x9E37_79B9, 0x243F_6A88)
"""The lanes before the first word: bits of the golden ratio and of pi. Zeros would be a fixed point of `mix`."""


@dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """Names one row of noise, a number for every token id, at each position that is sampled.

    `seed` is any 64-bit integer: a Python int, which a compiled graph keeps as a constant, or an int64 tensor
    without dimensions, which may change under the graph. `sample` [B] tells apart texts that are made side by
    side, `position` [B] or [B, T] the places in each (both int32 or int64, 0 .. 2^31-1), `stream` (0 .. 2^31-1)
    the uses of noise at one position.
    """

    seed: int | Tensor
    sample: Tensor
    position: Tensor
    stream: int = 0


def mix(x: Tensor) -> Tensor:
    """Permute 0 .. 2^32-1 (int64) so that every input bit flips every output bit about half the time.

    Two rounds of xorshift and multiply, parameters from the table of low-bias functions in
    https://github.com/skeeto/hash-prospector (README at commit 005ae41). It is the best entry with both
    multipliers below 2^31: their products with a word stay below 2^63, past which compiled C++ is undefined.
    """
    x = _xorshift(x, 16)
    x = _xorshift((x * 0x604B_AA5D) & MASK, 15)
    return _xorshift((x * 0x43D6_CE97) & MASK, 15)


def _xorshift(x: Tensor, bits: int) -> Tensor:
    # Inductor writes out an expression once for each of its uses, which doubles it here: a chain of n takes 2^n time
    # to compile (75 s for three words). A strided view needs its source in a buffer, which fusion then removes.
    x = x.as_strided(x.shape, x.stride())
    return x ^ (x >> bits)


def hash_u32(*words: Tensor) -> Tensor:
    """Hash words of 32 bits, int64 tensors that broadcast, into one: int64 in 0 .. 2^32-1.

    Two lanes carry 64 bits from word to word, since 32 would let rows of noise coincide after some 2^16 keys. The
    second lane has seen four rounds after the last word, and is the result.
    """
    first, second = (torch.full_like(words[0], lane) for lane in LANES)
    for word in words:
        first = mix(first ^ word)
        second = mix(second ^ first)
    return second


def gumbel_from_bits(bits: Tensor) -> Tensor:
    """Map uniform words (int64, 0 .. 2^32-1) to standard Gumbel noise: fp32, finite, from -2.9 to 22.9.

    With v uniform in (0, 1), -log(-log(1 - v)) is Gumbel distributed, and large where v is small. It is the large
    values that win an argmax, so v, not 1 - v, is what fp32 holds: near 0 it resolves all 2^32 steps, and log1p
    keeps them. Half a step keeps v off 0. Near 1 it rounds to 24 bits, and to 1 itself if not held back; that end
    is noise below -2.8, which wins only where it is the largest of a whole row.
    """
    v = (bits.float() + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-v.clamp(max=1 - 2.0**-24)))


def uniform(key: NoiseKey) -> Tensor:
    """Return one number for each row of the key: fp32 [B] or [B, T], uniform in (0, 1), both ends excluded."""
    bits = hash_u32(*_words(key))
    return ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def gumbel(key: NoiseKey, vocab_size: int, *, first_token: int = 0) -> Tensor:
    """Return the noise of tokens `first_token` .. `first_token + vocab_size - 1`: fp32 [B, V] or [B, T, V].

    Its integers are equal bit for bit everywhere; the two logarithms may differ in the last place between devices
    and compilers. Within a row no two tokens share an integer: over the last word alone the hash is a permutation.
    """
    tokens = torch.arange(first_token, first_token + vocab_size, device=key.position.device)
    return gumbel_from_bits(hash_u32(*(word[..., None] for word in _words(key)), tokens))


def _words(key: NoiseKey) -> tuple[Tensor, ...]:
    """Return what a key hashes, words of 32 bits that broadcast to the shape of its position."""
    seed = torch.full((), key.seed, device=key.position.device) if isinstance(key.seed, int) else key.seed
    position = key.position.long()
    sample = key.sample.long().reshape(-1, *[1] * (position.dim() - 1))
    return seed & MASK, (seed >> 32) & MASK, torch.full_like(seed, key.stream), sample, position
