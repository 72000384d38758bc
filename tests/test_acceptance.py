"""Both rules of acceptance keep the target's distribution; a rule that is off by one percent would be seen.

A million sequences of four tokens over a vocabulary of ten, drafted three at a time and decided by the real rule with
the real noise, against exact probabilities: chi-square over the tokens at each of the four places and over the pairs
at the first three, six statistics that share a significance of 1e-3 (Bonferroni). The same statistics refuse
eight rules that are wrong in ways that others have been wrong.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastgen import acceptance
from fastgen.acceptance import accept_equal, accept_or_resample, residual
from fastgen.noise import NoiseKey, gumbel, uniform
from fastgen.options import SamplingOptions
from fastgen.sampling import adjust
from tests.chi_square import fit_p_value

SIGNIFICANCE = 1e-3
V, K = 10, 3
SEQUENCES, CHUNK = 1_000_000, 8192  # a chunk's noise stays in the cache of one core

Rule = Callable[..., acceptance.Verdict]
PLAIN = SamplingOptions(temperature=1.0)

FILTERS = {
    "temperature": SamplingOptions(temperature=0.7),
    "top_k": SamplingOptions(temperature=1.0, top_k=5),
    "top_p": SamplingOptions(temperature=1.0, top_p=0.8),
    "min_p": SamplingOptions(temperature=1.0, min_p=0.1),
    "all": SamplingOptions(temperature=1.3, top_k=8, top_p=0.95, min_p=0.02),
}


def table(seed: int, scale: float = 1.0) -> Tensor:
    """Logits [V, V] of the next token by the last one."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)) * scale


def drafts_of(kind: str) -> Tensor:
    """Logits of a draft for `table(0)`: the same, one that proposes what the target never takes, or another."""
    if kind == "always":
        return table(0)
    if kind == "sometimes":
        return table(0) + 0.7 * table(1)
    return torch.where(torch.arange(V) < V // 2, 0.0, -torch.inf).expand(V, V)


def target_of(kind: str) -> Tensor:
    return table(0).masked_fill(torch.arange(V) < V // 2, -torch.inf) if kind == "never" else table(0)


def sequences(target: Tensor, draft: Tensor, options: SamplingOptions, rule: Rule, count: int) -> Tensor:
    """Return [count, K + 1] int64: texts behind token 0, round after round until each has K + 1 tokens."""
    p, q = (adjust(logits, options).softmax(-1) for logits in (target, draft))
    found = []
    for start in range(0, count, CHUNK):
        samples = torch.arange(start, min(start + CHUNK, count))
        text = torch.zeros(len(samples), 2 * K + 3, dtype=torch.int64)
        length = torch.zeros_like(samples)  # of the text, without token 0
        while (open_rows := (length <= K).nonzero()[:, 0]).numel():
            at = length[open_rows]
            tokens, counts = run_round(p, q, text[open_rows, at], samples[open_rows], at, rule)
            places = at[:, None] + 1 + torch.arange(K + 1)
            text[open_rows[:, None], places.clamp(max=2 * K + 2)] = tokens
            length[open_rows] += counts
        found.append(text[:, 1 : K + 2])
    return torch.cat(found)


def run_round(p: Tensor, q: Tensor, last: Tensor, samples: Tensor, at: Tensor, rule: Rule) -> acceptance.Verdict:
    """Draft from q [V, V] and decide by p with the engine's noise, streams 2, 1 and 0.

    Drafts are drawn by the inverse of their distribution, which takes a tenth of the noise that Gumbel's does.
    """

    def key(place: Tensor, stream: int = 0) -> NoiseKey:
        return NoiseKey(seed=7, sample=samples, position=place, stream=stream)

    drafts = [last]
    for place in range(K):
        chance = uniform(key(at + 1 + place, 2))[:, None]
        drafts.append((q[drafts[-1]].double().cumsum(1) < chance).sum(1).clamp(max=V - 1))
    chain = torch.stack(drafts, 1)
    chances = uniform(key(at[:, None] + 1 + torch.arange(K), 1))
    noise = lambda place: gumbel(key(at + 1 + place), V)  # noqa: E731
    return rule(p[chain], q[chain[:, :K]], chain[:, 1:], K, uniform=chances, gumbel=noise)


def p_values(texts: Tensor, target: Tensor, options: SamplingOptions) -> list[float]:
    """Return six p-values: of the tokens at places 1 to 4, and of the pairs at places 1, 2 and 2, 3."""
    p = adjust(target, options).double().softmax(-1)
    marginals = [torch.eye(V, dtype=torch.float64)[0]]
    for _ in range(K + 1):
        marginals.append(marginals[-1] @ p)
    values = []
    for place in range(K + 1):
        values.append(fit_p_value(torch.bincount(texts[:, place], minlength=V), marginals[place + 1]))
    for place in range(2):
        pairs = torch.bincount(texts[:, place] * V + texts[:, place + 1], minlength=V * V)
        values.append(fit_p_value(pairs, (marginals[place + 1][:, None] * p).flatten()))
    return values


@pytest.mark.parametrize("kind", ["always", "never", "sometimes"])
def test_a_million_resampled_sequences_have_the_targets_distribution(kind: str) -> None:
    texts = sequences(target_of(kind), drafts_of(kind), PLAIN, accept_or_resample, SEQUENCES)
    assert min(p_values(texts, target_of(kind), PLAIN)) > SIGNIFICANCE / 6


@pytest.mark.parametrize("name", FILTERS)
def test_a_million_filtered_sequences_have_the_targets_distribution(name: str) -> None:
    texts = sequences(table(0), drafts_of("sometimes"), FILTERS[name], accept_or_resample, SEQUENCES)
    assert min(p_values(texts, table(0), FILTERS[name])) > SIGNIFICANCE / 6


def with_chances(change: Callable[[Tensor], Tensor]) -> Rule:
    def rule(p: Tensor, q: Tensor, drafts: Tensor, limit: int, *, uniform: Tensor, gumbel: Callable) -> object:
        return accept_or_resample(p, q, drafts, limit, uniform=change(uniform), gumbel=gumbel)

    return rule


def bonus_from_the_draft(p: Tensor, q: Tensor, drafts: Tensor, limit: int, **noise: object) -> object:
    last = adjust(drafts_of("sometimes"), PLAIN).softmax(-1)[drafts[:, -1]]
    return accept_or_resample(torch.cat((p[:, :K], last[:, None]), 1), q, drafts, limit, **noise)


def with_residual(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[[pytest.MonkeyPatch], Rule]:
    def plant(patch: pytest.MonkeyPatch) -> Rule:
        def wrong(p: Tensor, q: Tensor, rejected: Tensor) -> Tensor:
            return torch.where(rejected, change(p, q), p)

        patch.setattr(acceptance, "residual", wrong)
        return accept_or_resample

    return plant


MUTANTS: dict[str, Callable[[pytest.MonkeyPatch], Rule]] = {
    "everything is accepted": lambda patch: with_chances(torch.zeros_like),
    "accepted where p > q, no chance": lambda patch: with_chances(torch.ones_like),
    "residual |p - q|": with_residual(lambda p, q: (p - q).abs()),
    "residual p": with_residual(lambda p, q: p),
    "residual q": with_residual(lambda p, q: q),
    "bonus from the draft": lambda patch: bonus_from_the_draft,
    "one percent more is accepted": lambda patch: with_chances(lambda chances: chances / 1.01),
    "five percent more is accepted": lambda patch: with_chances(lambda chances: chances / 1.05),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_statistics_refuse_a_wrong_rule(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = MUTANTS[mutant](monkeypatch)
    count = SEQUENCES if "one percent" in mutant else SEQUENCES // 10
    texts = sequences(table(0), drafts_of("sometimes"), PLAIN, rule, count)
    assert min(p_values(texts, table(0), PLAIN)) < SIGNIFICANCE / 6


def test_equal_drafts_stay_up_to_the_first_that_differs() -> None:
    choices = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8], [5, 6, 7, 8]])
    drafts = torch.tensor([[5, 6, 7], [5, 0, 7], [0, 6, 7], [5, 6, 0]])
    verdict = accept_equal(choices, drafts, 3)
    assert verdict.tokens.equal(choices)
    assert verdict.counts.tolist() == [4, 2, 1, 3]


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_filling_behind_the_limit_is_never_accepted(limit: int) -> None:
    drafts, p = torch.tensor([[1, 2, 3]]), torch.full((1, 4, V), 1 / V)
    assert accept_equal(torch.tensor([[1, 2, 3, 4]]), drafts, torch.tensor(limit)).counts.tolist() == [limit + 1]
    noise = torch.zeros(1, V)
    noise[0, 9] = 5.0
    verdict = accept_or_resample(
        p, p[:, :3], drafts, torch.tensor(limit), uniform=torch.full((1, 3), 0.01), gumbel=lambda place: noise
    )
    assert verdict.counts.tolist() == [limit + 1]
    assert verdict.tokens[0, limit] == 9, "the bonus is drawn from all of p"


def test_what_follows_a_refused_draft_is_never_that_draft() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3]])
    q = torch.tensor([[0.7, 0.1, 0.2]])
    assert residual(p, q, torch.tensor([[True]])).tolist()[0] == pytest.approx([0, 0.4, 0.1])
    assert residual(p, q, torch.tensor([[False]])).equal(p)
    assert residual(p, p, torch.tensor([[True]])).equal(p), "rounding refused a draft that p and q agree on"
