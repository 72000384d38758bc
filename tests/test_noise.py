"""The noise is the same everywhere, and nothing in it follows from its neighbours. Oracles: numpy's uint32, chi-square.

Significance is 1e-3, shared by the cases of a test (Bonferroni). The keys are fixed, so a test cannot fail by chance.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.noise import MASK, NoiseKey, gumbel, gumbel_from_bits, hash_u32, mix
from tests.chi_square import fit_p_value, independence_p_value, joint_counts

SIGNIFICANCE = 1e-3
WORDS = ("seed_low", "seed_high", "stream", "sample", "position", "token")

GOLDEN = (
    ((0, 0, 0, 0, 0, 0), 0xEAFB1526),
    ((1, 0, 0, 0, 0, 0), 0x0519E2EB),
    ((0, 1, 0, 0, 0, 0), 0x41B528DA),
    ((0, 0, 1, 0, 0, 0), 0xBC33B451),
    ((0, 0, 0, 1, 0, 0), 0x2B83F27A),
    ((0, 0, 0, 0, 1, 0), 0x0BB337DC),
    ((0, 0, 0, 0, 0, 1), 0x882C4F83),
    ((42, 0, 0, 0, 17, 2047), 0x3F5E9E16),
    ((0x89ABCDEF, 0x01234567, 2, 3, 4095, 128255), 0x10922377),
    ((MASK, MASK, MASK, MASK, MASK, MASK), 0xCBFF8DB9),
)
"""Words in the order of WORDS, and their hash: what every implementation has to give."""


def keyed_bits(count: int, **shift: int) -> Tensor:
    """Hash a grid of everyday keys, `count` of them, with the words named in `shift` moved by that much."""
    index = torch.arange(count)
    grid = {
        "seed_low": torch.tensor(7),
        "seed_high": torch.tensor(0),
        "stream": torch.tensor(0),
        "sample": (index >> 15) & 7,
        "position": (index >> 8) & 127,
        "token": (index & 255) + (index >> 18) * 256,
    }
    return hash_u32(*(grid[name] + shift.get(name, 0) for name in WORDS))


def key(seed: int, *, samples: int = 1, positions: int = 1, stream: int = 0) -> NoiseKey:
    position = torch.arange(positions).expand(samples, -1)
    return NoiseKey(seed=seed, sample=torch.arange(samples), position=position, stream=stream)


def hash_with_numpy(*words: np.ndarray) -> np.ndarray:
    """The hash as a kernel would write it, in uint32 that wraps."""

    def scramble(x: np.ndarray) -> np.ndarray:
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x604BAA5D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x43D6CE97)
        return x ^ (x >> np.uint32(15))

    left = np.full(words[0].shape, 0x9E3779B9, np.uint32)
    right = np.full(words[0].shape, 0x243F6A88, np.uint32)
    for word in words:
        left = scramble(left ^ word)
        right = scramble(right ^ left)
    return right


@pytest.mark.parametrize(("words", "expected"), GOLDEN)
def test_hash_gives_the_golden_values(words: tuple[int, ...], expected: int) -> None:
    assert hash_u32(*torch.tensor(words)).item() == expected


def test_int64_hash_equals_wrapping_uint32_arithmetic() -> None:
    words = np.random.default_rng(0).integers(0, 2**32, (6, 100_000), np.uint32)
    words[:, :2] = [[0, MASK]] * 6
    ours = hash_u32(*torch.from_numpy(words.astype(np.int64)))
    assert (ours.numpy() == hash_with_numpy(*words)).all()


def test_no_product_of_the_hash_can_leave_int64() -> None:
    multipliers = [c for c in mix.__code__.co_consts if isinstance(c, int) and 16 < c < MASK]
    assert len(multipliers) == 2
    assert max(multipliers) * MASK < 2**63


@pytest.mark.parametrize("low_bit", [0, 12, 24])
def test_bits_are_uniform_over_everyday_keys(low_bit: int) -> None:
    counts = torch.bincount((keyed_bits(1 << 20) >> low_bit) & 255, minlength=256)
    assert fit_p_value(counts, torch.full((256,), 1 / 256)) > SIGNIFICANCE / 3


@pytest.mark.parametrize("low_bit", [0, 14, 28])
@pytest.mark.parametrize("step", [1, 2, 64])
@pytest.mark.parametrize("word", WORDS)
def test_neighbouring_keys_are_independent(word: str, step: int, low_bit: int) -> None:
    here, there = keyed_bits(1 << 17), keyed_bits(1 << 17, **{word: step})
    table = joint_counts((here >> low_bit) & 15, (there >> low_bit) & 15, 16)
    assert independence_p_value(table) > SIGNIFICANCE / 54


def test_words_do_not_trade_places() -> None:
    a, b = torch.arange(1, 300)[:, None], torch.arange(1, 300)[None]
    there, back = hash_u32(a, b), hash_u32(b, a)
    assert int((there == back).sum()) == 299  # the diagonal


@pytest.mark.parametrize("word", range(len(WORDS)))
def test_each_bit_of_the_key_flips_half_of_the_hash(word: int) -> None:
    generator = torch.Generator().manual_seed(word)
    words = list(torch.randint(0, 1 << 32, (6, 1 << 12), generator=generator))
    before = hash_u32(*words)
    for bit in range(32):
        flipped = [w ^ (1 << bit) if i == word else w for i, w in enumerate(words)]
        changed = before ^ hash_u32(*flipped)
        share = ((changed[:, None] >> torch.arange(32)) & 1).double().mean(0)
        # 6 x 32 x 32 shares of 4096 draws: 5.5 standard deviations are passed with a chance of 2e-4.
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / math.sqrt(1 << 12), f"bit {bit}"


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    noise = gumbel(key(3, samples=64, positions=16), 1000)
    edges = -torch.log(-torch.log(torch.arange(1, 200, dtype=torch.float64) / 200))
    counts = torch.bincount(torch.bucketize(noise.double().flatten(), edges), minlength=200)
    assert fit_p_value(counts, torch.full((200,), 1 / 200)) > SIGNIFICANCE


def test_gumbel_noise_is_finite_at_both_ends_and_falls_with_the_bits() -> None:
    edge = torch.cat([torch.arange(1 << 10), (1 << 32) - 1 - torch.arange(1 << 10).flip(0)])
    noise = gumbel_from_bits(edge)
    assert noise.isfinite().all()
    assert (noise.diff() <= 0).all()
    assert -2.9 < noise[-1] < -2.8
    assert 22.8 < noise[0] < 22.9


def test_large_noise_keeps_every_bit_of_the_hash() -> None:
    bits = torch.arange(1 << 12)
    exact = -torch.log(-torch.log1p(-(bits.double() + 0.5) * 2.0**-32))
    assert gumbel_from_bits(bits).unique().numel() == 1 << 12
    torch.testing.assert_close(gumbel_from_bits(bits).double(), exact, rtol=3e-7, atol=0)


def test_a_slice_of_the_vocabulary_has_the_noise_of_the_whole() -> None:
    whole = gumbel(key(5, samples=3), 1000)
    parts = [gumbel(key(5, samples=3), 250, first_token=start) for start in range(0, 1000, 250)]
    assert torch.equal(torch.cat(parts, dim=-1), whole)


def test_many_positions_at_once_have_the_noise_of_each_alone() -> None:
    together = gumbel(key(5, samples=2, positions=8), 100)
    for position in range(8):
        alone = NoiseKey(seed=5, sample=torch.arange(2), position=torch.full((2,), position, dtype=torch.int32))
        assert torch.equal(gumbel(alone, 100), together[:, position])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63 - 1, -(2**63)])
def test_a_seed_is_the_same_as_a_number_and_as_a_tensor(seed: int) -> None:
    here = torch.zeros(1, dtype=torch.int64)
    as_tensor = NoiseKey(seed=torch.tensor(seed), sample=here, position=here)
    assert torch.equal(gumbel(NoiseKey(seed=seed, sample=here, position=here), 50), gumbel(as_tensor, 50))


def test_every_bit_of_the_seed_counts() -> None:
    rows = [gumbel(key(seed), 50) for seed in (0, *(1 << bit for bit in range(63)), -(2**63))]
    assert torch.cat([row.flatten(1) for row in rows]).unique(dim=0).shape[0] == 65


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_the_same_bits() -> None:
    words = [torch.arange(word, word + 100)[:, None] * 9 for word in range(5)] + [torch.arange(10_000)]
    there = [word.cuda() for word in words]
    assert torch.equal(hash_u32(*there).cpu(), hash_u32(*words))
    assert torch.equal(torch.compile(hash_u32, fullgraph=True)(*there).cpu(), hash_u32(*words))
