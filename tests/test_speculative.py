"""Speculation changes the time that a text takes, never the text: whatever drafts, however many, in any batch."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.engine import Engine
from fastgen.errors import CapacityError, UsageError
from fastgen.graphs import Burst
from fastgen.load import LoadedModel
from fastgen.options import MOST_DRAFTS, GenerationOptions, SamplingOptions
from fastgen.pace import PLAIN, Arm, Spent
from fastgen.readback import Readback
from fastgen.rounds import Round
from fastgen.sampling import adjust
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from fastgen.tally import Launch
from tests.chi_square import fit_p_value
from tests.models import random_model
from tests.readbacks import OneBehind
from tests.test_engine import FAMILIES, text_of

GREEDY = GenerationOptions(max_new_tokens=24, ignore_eos=True)
SAMPLED = SamplingOptions(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
EVERY_FILTER = GenerationOptions(max_new_tokens=24, ignore_eos=True, logprobs=True, sampling=SAMPLED)
CAPACITY = 128
PROMPTS = [text_of(3, 1), text_of(40, 2), text_of(1, 3)]


@pytest.fixture(scope="module")
def target() -> LoadedModel:
    return random_model()


def draft_of(name: str, target: LoadedModel) -> LoadedModel | str:
    """A draft that is always, sometimes or never right about `random_model()`."""
    made = {"same": random_model, "random": lambda: random_model(1), "itself": lambda: target}
    return made[name]() if name in made else name


def texts(engine: Engine, prompts: list[list[int]], options: GenerationOptions) -> list[tuple[int, ...]]:
    return [row.tokens for row in engine.generate(prompts, options)]


DRAFTS = ["same", "itself", "random", "self:1", "ngram"]


@pytest.mark.parametrize("options", [GREEDY, EVERY_FILTER], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_texts_are_plain_decodings_at_any_number_of_drafts(
    target: LoadedModel, draft: str, options: GenerationOptions
) -> None:
    expected = [texts(Engine(target, max_seq_len=CAPACITY), [prompt], options)[0] for prompt in PROMPTS]
    drafter = draft_of(draft, target)
    for count in (1, 4, MOST_DRAFTS if draft == "same" else 7, "auto"):
        engine = SpeculativeEngine(target, Speculation(draft=drafter, count=count), max_seq_len=CAPACITY)
        assert [texts(engine, [prompt], options)[0] for prompt in PROMPTS] == expected, count
        if draft in ("same", "itself") and count != "auto":
            assert engine.tally.acceptance == 1
            assert engine.tally.arms[Arm(0, count)] == -(-23 // (count + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_speculated_about(family: str) -> None:
    target, draft = random_model(**FAMILIES[family]), random_model(seed=2, **FAMILIES[family])
    expected = texts(Engine(target, max_seq_len=CAPACITY), [PROMPTS[1]], GREEDY)
    for chosen in (draft, "self:1"):
        engine = SpeculativeEngine(target, Speculation(draft=chosen, count=3), max_seq_len=CAPACITY)
        assert texts(engine, [PROMPTS[1]], GREEDY) == expected


@pytest.mark.parametrize("options", [GREEDY, EVERY_FILTER], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_rows_of_a_batch_accept_each_their_own(target: LoadedModel, draft: str, options: GenerationOptions) -> None:
    plain = Engine(target, batch=3, max_seq_len=CAPACITY)
    expected = plain.generate(PROMPTS, options)
    speculation = Speculation(draft=draft_of(draft, target), count=3)
    engine = SpeculativeEngine(target, speculation, batch=3, max_seq_len=CAPACITY)
    found = engine.generate(PROMPTS, options)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    for row, plain_row in zip(found, expected, strict=True):
        assert row.logprobs == pytest.approx(plain_row.logprobs, abs=1e-4)


def test_a_text_may_fill_the_context_to_its_last_token(target: LoadedModel) -> None:
    options = GenerationOptions(max_new_tokens=1000, ignore_eos=True)
    expected = Engine(target, batch=2, max_seq_len=48).generate(PROMPTS[:2], options)
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=7), batch=2, max_seq_len=48)
    found = engine.generate(PROMPTS[:2], options)
    assert [row.tokens for row in found] == [row.tokens for row in expected]
    assert [len(row.tokens) for row in found] == [45, 8]


@pytest.mark.parametrize("capacity", [3, 16, 24])
def test_auto_takes_the_shortest_contexts(target: LoadedModel, capacity: int) -> None:
    """Costs are measured beforehand with texts that fit."""
    options = GenerationOptions(max_new_tokens=100, ignore_eos=True)
    engine = SpeculativeEngine(target, Speculation(draft=random_model()), max_seq_len=capacity)
    assert texts(engine, [[7, 8]], options) == texts(Engine(target, max_seq_len=capacity), [[7, 8]], options)


def test_stop_strings_end_tokens_and_limits_cut_where_they_cut_plain_texts(target: LoadedModel) -> None:
    plain = Engine(target, max_seq_len=CAPACITY)
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=7), max_seq_len=CAPACITY)
    whole = plain.generate([PROMPTS[0]], GREEDY)[0]
    for options in (
        GenerationOptions(max_new_tokens=24, ignore_eos=True, stop=(whole.text[5:7],)),
        GenerationOptions(max_new_tokens=1),
        GenerationOptions(max_new_tokens=10),
    ):
        assert engine.generate([PROMPTS[0]], options) == plain.generate([PROMPTS[0]], options)
    original = target.tokenizer.stop_ids
    target.tokenizer.stop_ids = frozenset({whole.tokens[9]})
    ended = engine.generate([PROMPTS[0]], GenerationOptions(max_new_tokens=24))
    target.tokenizer.stop_ids = original
    assert ended[0].tokens == whole.tokens[: whole.tokens.index(whole.tokens[9]) + 1]


def test_a_longer_prompt_goes_on_from_the_caches_of_both_models(target: LoadedModel) -> None:
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=3), max_seq_len=CAPACITY)
    first = engine.generate([PROMPTS[1]], GREEDY)[0]
    prompt = [*PROMPTS[1], *first.tokens, *text_of(9, 8)]
    found = engine.generate([prompt], GREEDY)[0]
    assert engine.timings.prefilled_tokens < 12
    assert engine.tally.acceptance == 1, "the draft, which is the same model, has seen all of it too"
    assert found.tokens == texts(Engine(target, max_seq_len=CAPACITY), [prompt], GREEDY)[0]


def test_a_prompt_that_parts_from_the_last_text_is_shown_to_the_draft_from_there(target: LoadedModel) -> None:
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=3), max_seq_len=CAPACITY)
    engine.generate([PROMPTS[1]], GREEDY)
    engine.generate([[*PROMPTS[1][:20], *text_of(20, 9)]], GREEDY)
    assert engine.tally.acceptance == 1, "the draft, which is the same model, has forgotten the other text"


class Turns:
    """Plain rounds and drafted ones in turns, as `auto` mixes them."""

    arms = (Arm(0, 3), PLAIN)

    def __init__(self, plain: int) -> None:
        self.order = itertools.cycle([PLAIN] * plain + [Arm(0, 3)] * 2)

    def choose(self, missed: Sequence[int]) -> Arm:
        self.asked.append(list(missed))
        return next(self.order)

    def begin(self) -> None:
        self.asked: list[list[int]] = []

    def queue(self, arm: Arm, missed: Sequence[int]) -> None:
        assert list(missed) == (self.asked[-1] if arm.drafts else [])

    def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
        assert (spent.showing > 0) == bool(spent.missed)


@pytest.mark.parametrize(("plain", "batch", "shown"), [(5, 2, [16, 16, 16]), (17, 1, [16, 16])])
def test_a_draft_catches_up_after_rounds_without_it(
    target: LoadedModel, plain: int, batch: int, shown: list[int]
) -> None:
    """Plain rounds and drafted ones in turns, as `auto` mixes them: the same model goes on being always right."""

    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=3), batch=batch, max_seq_len=CAPACITY)
    engine.pace = Turns(plain)
    options = GenerationOptions(max_new_tokens=60, ignore_eos=True)
    found = texts(engine, PROMPTS[:batch], options)
    assert found == texts(Engine(target, batch=batch, max_seq_len=CAPACITY), PROMPTS[:batch], options)
    assert engine.tally.acceptance == 1 and engine.tally.arms[PLAIN] > 5
    assert shown in engine.pace.asked and [] in engine.pace.asked


@pytest.mark.parametrize("lengths", [(33,), (3, 40)])
def test_a_prompt_is_prefill_for_the_draft_too_and_is_shown_once(target: LoadedModel, lengths: tuple[int, ...]) -> None:
    engine = SpeculativeEngine(
        target, Speculation(draft=random_model(), count=3), batch=len(lengths), max_seq_len=CAPACITY
    )
    engine.pace, shown, show = Turns(2), list[tuple[int, int]](), engine._rounds.show

    def observed(drafter: int, start: int, width: int) -> None:
        shown.append((start, width))
        show(drafter, start, width)

    engine._rounds.show = observed
    steps = engine.tokens([text_of(length, 5) for length in lengths], GREEDY, samples=range(len(lengths)))
    next(steps)
    longest, shortest = -(-max(lengths) // 16) * 16, min(lengths)
    assert shown == [(start, 16) for start in range(0, longest, 16)], "before there is a first token"
    shown.clear()
    for _ in range(3):  # two plain rounds, and what one with drafts begins with
        next(steps)
    assert shown[0] == (shortest, 16), "what rounds without the draft may have moved on from, nothing before"


def test_a_draft_catches_up_beside_a_text_that_is_full(target: LoadedModel) -> None:
    """A text that has ended goes on giving tokens while others do not; the draft is shown none that do not fit."""
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=3), batch=2, max_seq_len=48)
    engine.pace = Turns(5)
    options = GenerationOptions(max_new_tokens=60, ignore_eos=True)
    plain = Engine(target, batch=2, max_seq_len=48)
    assert texts(engine, PROMPTS[:2], options) == texts(plain, PROMPTS[:2], options)


@pytest.mark.parametrize(("context", "count", "most"), [(CAPACITY, 40, 40), (48, 60, 45)])
@pytest.mark.parametrize("readback", [Readback, OneBehind])
def test_plain_rounds_are_bursts_while_the_slowest_text_needs_all_of_them(
    target: LoadedModel, readback: type, context: int, count: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round that the host has not read yet counts with the tokens that it gives at least, and of a prompt of three
    tokens no more are needed than its context holds."""
    engine = SpeculativeEngine(target, Speculation(draft="self:1", count=3), batch=2, max_seq_len=context)
    monkeypatch.setattr("fastgen.speculative.Readback", readback)
    engine._rounds.burst = Burst(8, 1)
    given: list[Sequence[int]] = []  # by each round that was read, to each text
    asked: list[tuple[Arm, int, int]] = []  # of each launch: what is left, and after how many rounds that were read
    launch = engine._launch

    def launched(arm: Arm, filled: int, left: int, options: GenerationOptions) -> tuple[Round, Launch]:
        asked.append((arm, left, len(given)))
        return launch(arm, filled, left, options)

    class Noting(Turns):
        def record(self, arm: Arm, spent: Spent, tokens: Sequence[int]) -> None:
            given.append(tokens)

    monkeypatch.setattr(engine, "_launch", launched)
    engine.pace = Noting(2)
    options = GenerationOptions(max_new_tokens=count, ignore_eos=True)
    assert texts(engine, PROMPTS[:2], options) == texts(
        Engine(target, batch=2, max_seq_len=context), PROMPTS[:2], options
    )
    lengths = []
    for number, (arm, left, read) in enumerate(asked):
        lengths.append(Burst(8, 1).steps(left) if arm == PLAIN else 1)
        least = min(map(sum, zip(*given[:read], strict=True)), default=0)
        assert left == most - 1 - least - sum(lengths[read:number]), number
    plain = [length for (arm, _, _), length in zip(asked, lengths, strict=True) if arm == PLAIN]
    assert [list(row) for row in given if len(set(row)) > 1], "some round gives one text more than the other"
    assert 8 in plain and (1 in plain or context < CAPACITY)


def test_pieces_say_which_tokens_were_drafted(target: LoadedModel) -> None:
    engine = SpeculativeEngine(target, Speculation(draft=random_model(), count=3), max_seq_len=CAPACITY)
    drafted = [piece.drafted for piece in engine.stream([PROMPTS[0]], GREEDY)]
    assert drafted == [False] + [True, True, True, False] * 5 + [True, True, True]
    assert not any(piece.drafted for piece in Engine(target, max_seq_len=CAPACITY).stream([PROMPTS[0]], GREEDY))


def test_the_tally_adds_up(target: LoadedModel) -> None:
    engine = SpeculativeEngine(target, Speculation(draft="self:1", count=4), batch=2, max_seq_len=CAPACITY)
    engine.generate(PROMPTS[:2], GREEDY)
    tally = engine.tally
    assert tally.rounds == 2 * tally.arms[Arm(0, 4)] == tally.tried[1]
    assert tally.kept.total() == sum(accepted * rounds for accepted, rounds in tally.accepted.items())
    assert all(tally.tried[place + 1] == tally.kept[place] for place in (1, 2, 3))
    assert 0 < tally.acceptance < 1
    assert len(tally.draft_seconds) == len(tally.verify_seconds) == tally.arms[Arm(0, 4)]


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: object, types: object, arguments: tuple = (), keywords: dict | None = None):
        self.calls[function.overloadpacket.__name__] += 1
        return function(*arguments, **(keywords or {}))


def test_a_plain_step_under_speculation_is_a_step_of_plain_decoding_and_nothing_else(target: LoadedModel) -> None:
    """A burst of eight has seven times more operations than a single step, each one of the plain engine's."""
    plain = Engine(target, max_seq_len=CAPACITY)
    engine = SpeculativeEngine(target, Speculation(draft="self:1", count=3), max_seq_len=CAPACITY)
    for one in (plain, engine):
        one.generate([PROMPTS[1]], GREEDY)
    with torch.inference_mode(), Counting() as step:
        plain._steps.decode(60, GREEDY.sampling, logprobs=False, left=1)
    bursts = []
    for burst in (1, 8):
        engine._rounds.burst = Burst(burst, burst)
        with torch.inference_mode(), Counting() as counting:
            done, launch = engine._launch(PLAIN, 60, burst, GREEDY)
        assert done.tokens.shape == (1, burst) == (1, launch.tokens) and done.counts is None
        bursts.append(counting.calls)
    views = ("select", "unbind", "slice", "unsqueeze", "view", "expand")
    added = {name: count for name, count in (bursts[1] - bursts[0]).items() if name not in views}
    expected = {name: 7 * count for name, count in step.calls.items() if name not in views}
    assert {name: count for name, count in added.items() if count > expected.get(name, 0)} == {}


def test_rounds_of_other_lengths_are_other_graphs_that_read_as_far_as_they_get(
    target: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds = SpeculativeEngine(target, Speculation(draft="self:1"), max_seq_len=CAPACITY)._rounds
    cases: list[object] = []
    monkeypatch.setattr(rounds, "_graphs", SimpleNamespace())
    monkeypatch.setattr(rounds, "_run", lambda case, work: cases.append(case[:3]))
    rounds.bounds = [64, 128]
    for steps, filled in ((8, 56), (8, 57), (1, 57), (1, 64)):
        rounds.decode(steps, filled, GREEDY.sampling, logprobs=False)
    rounds.verify(8, 57, GREEDY.sampling, logprobs=False)
    assert cases == [
        ("decode", 8, 64), ("decode", 8, 128), ("decode", 1, 64), ("decode", 1, 128), ("verify", 8, 128)
    ]  # fmt: skip


class NoHost(TorchDispatchMode):
    """Refuses every operation that reads a value of the device's on the host, or whose shape depends on one."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique", "is_nonzero")

    def __torch_dispatch__(self, function: object, types: object, arguments: tuple = (), keywords: dict | None = None):
        name = function.overloadpacket.__name__.rstrip("_")
        assert name not in self.WAITING, f"a round waits for the device: {name}"
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("accept", ["coupled", "leviathan"])
@pytest.mark.parametrize("draft", ["random", "self:1", "ngram"])
def test_a_round_reads_nothing_on_the_host(target: LoadedModel, draft: str, accept: str) -> None:
    """Drafting, verifying, accepting and moving on: no host synchronisation; the engine reads one result a round."""
    speculation = Speculation(draft=draft_of(draft, target), count=3, accept=accept)
    engine = SpeculativeEngine(target, speculation, batch=2, max_seq_len=CAPACITY)
    engine.generate(PROMPTS[:2], EVERY_FILTER)
    with torch.inference_mode(), NoHost():
        for arm in (Arm(0, 3), PLAIN):
            engine._launch(arm, 60, 1, EVERY_FILTER)
        with pytest.raises(AssertionError, match="waits for the device"):
            engine._rounds.rows.positions.max().item()


@pytest.mark.parametrize("accept", ["coupled", "leviathan"])
def test_no_more_is_accepted_than_was_drafted_however_wide_the_round(target: LoadedModel, accept: str) -> None:
    engine = SpeculativeEngine(target, Speculation(draft="self:2", count=4, accept=accept), max_seq_len=CAPACITY)
    sampling = SamplingOptions(temperature=1.0, seed=1)
    engine.generate([text_of(4)], GenerationOptions(max_new_tokens=60, ignore_eos=True, sampling=sampling))
    assert set(engine.tally.accepted) == {4}, "all of a draft that is the target itself, in rounds of 8 tokens"


def test_leviathans_rule_is_greedy_decoding_without_a_temperature(target: LoadedModel) -> None:
    expected = texts(Engine(target, max_seq_len=CAPACITY), [PROMPTS[0]], GREEDY)
    speculation = Speculation(draft=random_model(1), count=3, accept="leviathan")
    assert texts(SpeculativeEngine(target, speculation, max_seq_len=CAPACITY), [PROMPTS[0]], GREEDY) == expected


@pytest.mark.parametrize(
    ("draft", "sampling"),
    [
        ("random", {}),
        ("random", {"top_k": 6, "repetition_penalty": 1.3}),
        ("self:1", {}),
        ("ngram", {"top_k": 6, "repetition_penalty": 1.3}),
    ],
)
def test_leviathans_texts_have_the_targets_distribution(draft: str, sampling: dict[str, float]) -> None:
    """Of a whole engine: 20,000 texts over a vocabulary of ten, the pairs of tokens behind the likeliest first."""
    target = random_model(vocab_size=10, max_seq_len=32)
    drafter = random_model(1, vocab_size=10, max_seq_len=32) if draft == "random" else draft
    prompt, batch = [3, 1, 4, 1], 2000
    options = GenerationOptions(sampling=SamplingOptions(temperature=1.5, seed=3, **sampling))
    chances, _ = pair_probabilities(target, prompt, options.sampling)
    first = int(chances.argmax())
    engine = SpeculativeEngine(target, Speculation(draft=drafter, count=3, accept="leviathan"), batch=batch)
    pairs = torch.zeros(100)
    for start in range(0, 20_000, batch):
        steps = engine.tokens([prompt] * batch, options, samples=range(start, start + batch))
        rows = torch.tensor([step.tokens for step in itertools.islice(steps, 3)]).T
        chosen = rows[rows[:, 0] == first]
        pairs += torch.bincount(chosen[:, 1] * 10 + chosen[:, 2], minlength=100)
    second, third = pair_probabilities(target, [*prompt, first], options.sampling)
    expected = (second[:, None] * third).flatten()
    common = expected * pairs.sum() >= 5
    counts = torch.cat((pairs[common], pairs[~common].sum()[None]))
    assert fit_p_value(counts, torch.cat((expected[common], expected[~common].sum()[None]))) > 1e-3


def pair_probabilities(
    model: LoadedModel, prompt: list[int], sampling: SamplingOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact probabilities of the token behind a prompt [V], and of the one behind each of them [V, V]."""

    def following(texts: list[list[int]]) -> torch.Tensor:
        model.transformer.allocate_cache(len(texts), 32)
        positions = torch.arange(len(texts[0]))
        lengths = torch.full((len(texts),), len(texts[0]))
        hidden = model.transformer(torch.tensor(texts), positions.repeat(len(texts), 1), positions, lengths)
        seen = torch.zeros(len(texts), 10, dtype=torch.bool).scatter(1, torch.tensor(texts), True)
        return adjust(model.transformer.logits(hidden[:, -1]), sampling, seen=seen).double().softmax(-1)

    return following([prompt])[0], following([[*prompt, token] for token in range(10)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 16}, "--speculate 16: expected 1 to 15 tokens a round, or auto"),
        ({"count": 0}, "--speculate 0: expected 1 to 15"),
        ({"accept": "often"}, "--accept often: expected coupled or leviathan"),
        ({"accept": "leviathan"}, "--accept leviathan: needs a fixed --speculate K"),
        ({"draft": "self:9"}, "--draft self:9: expected a model, ngram, none, or self:N with N from 1 to 2"),
        ({"draft": "self:x"}, "--draft self:x: expected"),
    ],
)
def test_what_cannot_be_is_refused(target: LoadedModel, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        SpeculativeEngine(target, Speculation(**arguments), max_seq_len=CAPACITY)


def test_a_draft_of_another_vocabulary_is_refused_with_the_first_difference(target: LoadedModel) -> None:
    draft = random_model(1)
    draft.tokenizer.token_bytes = lambda token: b"?" if token == 65 else bytes([token % 256])
    with pytest.raises(UsageError, match=r"--draft random: its vocabulary is another: token 65 is b'\?' there"):
        SpeculativeEngine(target, Speculation(draft=draft, count=3))


def test_a_rotation_that_hangs_on_the_texts_length_is_refused() -> None:
    from fastgen.config import RopeScaling

    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=64)
    with pytest.raises(UsageError, match="dynamic NTK"):
        SpeculativeEngine(random_model(rope_scaling=scaling), Speculation(count=3))


def test_a_draft_cache_that_does_not_fit_says_so(target: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = random_model(1, n_layers=64)
    monkeypatch.setattr("fastgen.device.free_memory", lambda device: 1_000_000)
    with pytest.raises(CapacityError, match="the draft's KV cache needs"):
        SpeculativeEngine(target, Speculation(draft=draft, count=3), max_seq_len=CAPACITY)


def test_a_draft_that_another_engine_took_ends_the_text(target: LoadedModel) -> None:
    draft = random_model(1)
    speculation = Speculation(draft=draft, count=3)
    first = SpeculativeEngine(target, speculation, max_seq_len=CAPACITY).stream([PROMPTS[0]], GREEDY)
    next(first)
    SpeculativeEngine(random_model(2), speculation, max_seq_len=CAPACITY)
    with pytest.raises(UsageError, match="this text cannot go on"):
        list(first)
