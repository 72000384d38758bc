"""Filters are those of transformers, draws have the distribution that they claim, and hard cases have one answer.

Oracles: transformers' logits processors, fp64 softmax with chi-square. Significance is 1e-3, shared by the cases of a
test (Bonferroni). Keys and logits are fixed, so a test cannot fail by chance.
"""

import math

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from fastgen.errors import UsageError
from fastgen.noise import NoiseKey, gumbel
from fastgen.sampling import (
    INVALID_TOKEN,
    SamplingOptions,
    best_token,
    filter_logits,
    log_probabilities,
    penalize,
    sample,
)
from tests.chi_square import fit_p_value, independence_p_value, joint_counts

SIGNIFICANCE = 1e-3

FILTERS = {
    "temperature": SamplingOptions(temperature=0.7),
    "hot": SamplingOptions(temperature=1.9),
    "top_k": SamplingOptions(temperature=1.0, top_k=7),
    "top_k=1": SamplingOptions(temperature=1.0, top_k=1),
    "top_k>V": SamplingOptions(temperature=1.0, top_k=5000),
    "top_p": SamplingOptions(temperature=1.0, top_p=0.8),
    "tiny top_p": SamplingOptions(temperature=1.0, top_p=1e-9),
    "top_p near 1": SamplingOptions(temperature=1.0, top_p=0.9999),
    "min_p": SamplingOptions(temperature=1.0, min_p=0.1),
    "min_p=1": SamplingOptions(temperature=1.0, min_p=1.0),
    "all": SamplingOptions(temperature=1.3, top_k=20, top_p=0.9, min_p=0.05),
}


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def filtered_by_transformers(logits: Tensor, options: SamplingOptions) -> Tensor:
    """What `generate` of transformers does with logits [B, V] under the same options."""
    chain = [theirs.TemperatureLogitsWarper(options.temperature)]
    if options.top_k:
        chain.append(theirs.TopKLogitsWarper(options.top_k))
    if options.top_p < 1:
        chain.append(theirs.TopPLogitsWarper(options.top_p))
    if options.min_p:
        chain.append(theirs.MinPLogitsWarper(options.min_p))
    for warper in chain:
        logits = warper(torch.empty(0), logits)
    return logits


def draw(logits: Tensor, options: SamplingOptions, count: int, *, seed: int = 0, sample_id: int = 0) -> Tensor:
    """Sample `count` tokens from the same logits [V], at one position after another."""
    positions = torch.arange(count)
    noise_key = NoiseKey(seed=seed, sample=torch.full_like(positions, sample_id), position=positions)
    return sample(logits.expand(count, -1), options, key=noise_key)


@pytest.mark.parametrize("vocab", [50, 1003])
@pytest.mark.parametrize("name", FILTERS)
def test_filters_equal_those_of_transformers(name: str, vocab: int) -> None:
    logits = random_logits(64, vocab, seed=vocab)
    ours, reference = filter_logits(logits, FILTERS[name]), filtered_by_transformers(logits, FILTERS[name])
    assert torch.equal(ours.isinf(), reference.isinf())
    assert (ours.isfinite().sum(-1) >= 1).all()
    torch.testing.assert_close(ours.softmax(-1), reference.softmax(-1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.3])
def test_repetition_penalty_equals_that_of_transformers(penalty: float) -> None:
    logits = random_logits(8, 100)
    earlier = torch.randint(0, 100, (8, 30), generator=torch.Generator().manual_seed(1))
    seen = torch.zeros(8, 100, dtype=torch.bool).scatter_(1, earlier, True)
    reference = theirs.RepetitionPenaltyLogitsProcessor(penalty)(earlier, logits)
    assert torch.equal(penalize(logits, seen, penalty), reference)


def test_repetition_penalty_applies_to_greedy_tokens_too() -> None:
    logits, seen = torch.tensor([[1.0, 2.0, 1.5]]), torch.tensor([[False, True, False]])
    assert sample(logits, SamplingOptions(repetition_penalty=1.5), seen=seen).tolist() == [2]


def test_tokens_that_tie_at_a_threshold_stay_together() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]]))
    for options in (SamplingOptions(temperature=1.0, top_k=2), SamplingOptions(temperature=1.0, top_p=0.5)):
        assert filter_logits(logits, options).isfinite().tolist() == [[False, True, True, True, False]]


@pytest.mark.parametrize("name", FILTERS)
def test_draws_have_the_distribution_of_the_filtered_logits(name: str) -> None:
    logits = random_logits(16, seed=3, scale=1.0)
    counts = torch.bincount(draw(logits, FILTERS[name], 200_000), minlength=16)
    expected = filtered_by_transformers(logits[None].double(), FILTERS[name])[0].softmax(-1)
    assert fit_p_value(counts, expected) > SIGNIFICANCE / len(FILTERS)


def test_a_bias_of_five_percent_in_one_token_would_be_noticed() -> None:
    logits = random_logits(16, seed=3, scale=1.0)
    counts = torch.bincount(draw(logits, FILTERS["temperature"], 200_000), minlength=16)
    biased = filtered_by_transformers(logits[None].double(), FILTERS["temperature"])[0].softmax(-1)
    biased[biased.argmax()] *= 1.05
    assert fit_p_value(counts, biased / biased.sum()) < SIGNIFICANCE / len(FILTERS)


def test_rare_tokens_are_drawn_as_often_as_they_should_be() -> None:
    logits = torch.log(torch.tensor([1 - 1.5e-4, 1e-4, 5e-5]))
    counts = torch.bincount(draw(logits, SamplingOptions(temperature=1.0), 1_000_000), minlength=3)
    assert fit_p_value(counts, logits.double().softmax(-1)) > SIGNIFICANCE


def test_the_same_key_draws_the_same_token() -> None:
    options, logits = FILTERS["all"], random_logits(100)
    assert torch.equal(draw(logits, options, 1000, seed=5), draw(logits, options, 1000, seed=5))


@pytest.mark.parametrize("change", ["seed", "sample", "position", "stream"])
def test_draws_under_different_keys_are_independent(change: str) -> None:
    count, options = 100_000, SamplingOptions(temperature=1.0)
    logits = random_logits(6, scale=0.7).expand(count, -1)
    position = torch.arange(count) * 2
    here = NoiseKey(seed=1, sample=torch.zeros_like(position), position=position)
    there = NoiseKey(
        seed=1 + (change == "seed"),
        sample=here.sample + (change == "sample"),
        position=position + (change == "position"),
        stream=int(change == "stream"),
    )
    table = joint_counts(sample(logits, options, key=here), sample(logits, options, key=there), 6)
    assert independence_p_value(table) > SIGNIFICANCE / 4


def test_compiled_and_eager_sampling_give_the_same_tokens() -> None:
    options = SamplingOptions(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2)

    def step(logits: Tensor, seed: Tensor, position: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noise_key = NoiseKey(seed=seed, sample=torch.zeros_like(position), position=position)
        noise = gumbel(noise_key, logits.shape[-1])
        token = sample(logits, options, key=noise_key, seen=seen)
        return token, noise, best_token(logits.round())

    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    seen = torch.rand(64, 1003, generator=torch.Generator().manual_seed(1)) < 0.1
    for seed in (0, 2**40 + 5, -1):
        inputs = (random_logits(64, 1003), torch.tensor(seed), torch.arange(64), seen)
        eager = step(*inputs)
        for ours, reference in zip(compiled(*inputs), eager, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab", [10, 1003, 4096])
def test_greedy_takes_the_lowest_id_on_ties(vocab: int) -> None:
    firsts = torch.tensor([0, vocab // 3, vocab - 1])
    logits = (torch.arange(vocab) >= firsts[:, None]).float()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(sample(logits.to(dtype), SamplingOptions()), firsts)


@pytest.mark.parametrize("options", [SamplingOptions(), *FILTERS.values()])
def test_logits_that_name_no_token_give_the_invalid_token(options: SamplingOptions) -> None:
    logits = random_logits(5, 30)
    logits[1, 7] = math.nan
    logits[2] = -math.inf
    logits[3, 3] = math.inf
    noise_key = NoiseKey(seed=0, sample=torch.arange(5), position=torch.arange(5))
    tokens = sample(logits, options, key=noise_key)
    assert (tokens == INVALID_TOKEN).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize("name", FILTERS)
def test_the_only_possible_token_is_drawn(name: str) -> None:
    logits = torch.full((100,), -math.inf)
    logits[42] = -5.0
    assert (draw(logits, FILTERS[name], 50) == 42).all()


def test_large_logits_and_small_temperatures_keep_their_distribution() -> None:
    # 1e4 / 1e-3 is 1e7, where fp32 counts in ones: noise added to that would be rounded away.
    logits = torch.tensor([10_000.0, 10_000.0 - 2**-10, -10_000.0])
    counts = torch.bincount(draw(logits, SamplingOptions(temperature=1e-3), 100_000), minlength=3)
    expected = ((logits.double() - 10_000) / 1e-3).softmax(-1)
    assert counts[2] == 0
    assert fit_p_value(counts, expected) > SIGNIFICANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_sampled_in_fp32(dtype: torch.dtype) -> None:
    logits = random_logits(200).to(dtype)
    options = FILTERS["all"]
    assert torch.equal(draw(logits, options, 500), draw(logits.float(), options, 500))


def test_many_positions_at_once_draw_the_tokens_of_each_alone() -> None:
    logits, options, positions = random_logits(2, 8, 100), FILTERS["all"], torch.arange(16).view(2, 8)
    together = sample(logits, options, key=NoiseKey(seed=1, sample=torch.arange(2), position=positions))
    for t in range(8):
        alone = NoiseKey(seed=1, sample=torch.arange(2), position=positions[:, t])
        assert torch.equal(sample(logits[:, t], options, key=alone), together[:, t])


@pytest.mark.parametrize("options", [SamplingOptions(repetition_penalty=1.1), *FILTERS.values()])
def test_nothing_is_read_on_the_host(options: SamplingOptions) -> None:
    # Meta tensors have no values: whatever reads one, or shapes itself by one, raises.
    logits, places = torch.empty(3, 100, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    seen = torch.empty(3, 100, dtype=torch.bool, device="meta")
    tokens = sample(logits, options, key=NoiseKey(seed=1, sample=places, position=places), seen=seen)
    assert tokens.shape == log_probabilities(logits, tokens).shape == (3,)


def test_log_probabilities_equal_an_fp64_log_softmax() -> None:
    logits = random_logits(4, 7, 500, scale=10.0)
    tokens = torch.randint(0, 500, (4, 7), generator=torch.Generator().manual_seed(2))
    tokens[1, 1] = INVALID_TOKEN
    reference = logits.double().log_softmax(-1).gather(-1, tokens.clamp(min=0)[..., None])[..., 0]
    reference[1, 1] = math.nan
    ours = log_probabilities(logits, tokens)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), reference, rtol=1e-6, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -0.5, "--temperature -0.5: expected 0 (greedy), or 1e-6 to 1e6"),
        ("temperature", math.nan, "--temperature nan"),
        ("temperature", math.inf, "--temperature inf"),
        ("top_k", -1, "--top-k -1: expected a number of tokens, or 0 for all"),
        ("top_p", 1.5, "--top-p 1.5: expected a number above 0, up to 1 (off)"),
        ("top_p", 0.0, "--top-p 0.0"),
        ("min_p", 1.01, "--min-p 1.01: expected a number from 0 (off) to 1"),
        ("min_p", math.nan, "--min-p nan"),
        ("repetition_penalty", 0.0, "--repetition-penalty 0.0: expected 1e-6 to 1e6"),
        ("seed", 2**63, f"--seed {2**63}: expected an integer of 64 bits"),
    ],
)
def test_options_out_of_range_are_refused_by_their_flag(field: str, value: float, message: str) -> None:
    with pytest.raises(UsageError) as error:
        SamplingOptions(**{field: value})
    assert str(error.value).startswith(message)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["temperature", "all"])
def test_a_gpu_draws_the_tokens_of_the_cpu(name: str) -> None:
    options, logits, places = FILTERS[name], random_logits(64, 128_256), torch.arange(64)

    def step(logits: Tensor, places: Tensor) -> Tensor:
        return sample(logits, options, key=NoiseKey(seed=3, sample=places, position=places))

    reference = step(logits, places)
    assert torch.equal(step(logits.cuda(), places.cuda()).cpu(), reference)
    compiled = torch.compile(step, fullgraph=True, dynamic=False)
    assert torch.equal(compiled(logits.cuda(), places.cuda()).cpu(), reference)
