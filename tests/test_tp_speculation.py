"""Speculation on several ranks: whoever drafts, and however many, the texts of one process; all follow rank 0's clock.

Threads stand for ranks here, but for one run of torchrun over gloo.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

from fastgen.drafters import Draft
from fastgen.engine import Engine
from fastgen.errors import RankLostError
from fastgen.load import LoadedModel
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pace import PLAIN, Arm
from fastgen.speculation import AUTO, Speculation
from fastgen.speculative import SpeculativeEngine
from tests.rank_threads import on_ranks
from tests.sharded import CASES, PROMPTS, drafting, part, whole
from tests.speculating_rank import DRAFTS, OPTIONS, PROMPT, load
from tests.torchrun import torchrun
from tp.dist import Ranks

SAMPLED = SamplingOptions(temperature=1.0, top_k=40, seed=4)


class Whims:
    """Chooses by no clock at all, and every rank by another."""

    def __init__(self, arms: list[Arm], rank: int) -> None:
        self.arms = [*arms, PLAIN]
        self.chance = random.Random(rank)

    def choose(self, missed: Sequence[int]) -> Arm:
        return self.chance.choice(self.arms)

    def begin(self) -> None:
        pass

    def queue(self, arm: Arm, missed: Sequence[int]) -> None:
        pass

    def record(self, *learned: object) -> None:
        pass


@pytest.mark.parametrize("sampling", [SamplingOptions(), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", ["model", "itself", "self:1", "ngram"])
def test_ranks_whose_clocks_disagree_take_the_same_rounds(draft: str, sampling: SamplingOptions) -> None:
    case = CASES["259 tokens"]
    model, other = whole(case), drafting(case)
    options = GenerationOptions(max_new_tokens=30, ignore_eos=True, sampling=sampling)
    expected = [row.tokens for row in Engine(model, batch=2, max_seq_len=64).generate(PROMPTS[:2], options)]

    def generate(ranks: Ranks) -> tuple[list[tuple[int, ...]], dict[str, int]]:
        mine = part(model, ranks)
        drafter = {"model": lambda: part(other, ranks), "itself": lambda: mine}.get(draft, lambda: draft)()
        engine = SpeculativeEngine(mine, Speculation(draft=drafter, count=AUTO), batch=2, max_seq_len=64)
        engine.generate(PROMPTS[:2], GenerationOptions(max_new_tokens=2, sampling=sampling))  # measures costs
        engine.pace = Whims(engine.arms, ranks.rank)
        return [row.tokens for row in engine.generate(PROMPTS[:2], options)], engine.figures().arms

    found = on_ranks(2, generate)
    assert [texts for texts, _ in found] == [expected] * 2
    assert found[0][1] == found[1][1] and len(found[0][1]) > 3, "many kinds of rounds, the same on both"


@pytest.mark.parametrize("draft", ["model", "itself", "self:1", "ngram"])
@pytest.mark.parametrize(
    ("accept", "sampling"),
    [("coupled", SamplingOptions(repetition_penalty=1.2)), ("coupled", SAMPLED), ("leviathan", SAMPLED)],
    ids=["greedy, penalized", "coupled", "leviathan"],
)
def test_ranks_whose_parts_of_the_vocabulary_differ_in_size_accept_what_one_process_does(
    draft: str, accept: str, sampling: SamplingOptions
) -> None:
    case = CASES["259 tokens"]
    model, other = whole(case), drafting(case)
    options = GenerationOptions(max_new_tokens=40, ignore_eos=True, sampling=sampling)

    def generate(target: LoadedModel, model: LoadedModel) -> tuple[list[tuple[int, ...]], float | None]:
        drafter = {"model": model, "itself": target}.get(draft, draft)
        speculation = Speculation(draft=drafter, count=3, accept=accept)
        engine = SpeculativeEngine(target, speculation, batch=2, max_seq_len=64)
        return [row.tokens for row in engine.generate(PROMPTS[:2], options)], engine.tally.acceptance

    expected = generate(model, other)
    assert on_ranks(3, lambda ranks: generate(part(model, ranks), part(other, ranks))) == [expected] * 3
    assert draft != "itself" or expected[1] == 1


def test_drafts_that_ranks_differ_on_are_noticed_by_all() -> None:
    model = whole(CASES["fp32"])

    def generate(ranks: Ranks) -> str:
        engine = SpeculativeEngine(part(model, ranks), Speculation(draft="self:1", count=3), max_seq_len=64)
        (drafter,) = engine.drafters
        draft = drafter.draft

        def draft_otherwise(*given: object, **more: object) -> Draft:
            return Draft(draft(*given, **more).tokens + ranks.rank, None)

        drafter.draft = draft_otherwise
        with pytest.raises(RankLostError) as error:
            engine.generate(PROMPTS[:1], GenerationOptions(max_new_tokens=9))
        return str(error.value)

    assert all("--check-ranks" in message for message in on_ranks(2, generate))


def test_a_verified_token_that_ranks_differ_on_is_noticed_by_all() -> None:
    model = whole(CASES["fp32"])

    def generate(ranks: Ranks) -> str:
        mine = part(model, ranks)
        engine = SpeculativeEngine(mine, Speculation(draft="ngram", count=3), max_seq_len=64)
        embed = mine.transformer.stages.embed

        def embed_otherwise(tokens: Tensor, *given: object) -> Tensor:
            return embed(tokens, *given) * (1 + 1e-6 * ranks.rank * (tokens.shape[1] == 4))

        mine.transformer.stages.embed = embed_otherwise
        with pytest.raises(RankLostError) as error:
            engine.generate(PROMPTS[:1], GenerationOptions(max_new_tokens=9))
        return str(error.value)

    assert all("--check-ranks" in message for message in on_ranks(2, generate))


def test_processes_that_speculate_give_the_texts_of_one(tmp_path: Path) -> None:
    with torchrun(tmp_path, 2, str(tmp_path), module="tests.speculating_rank") as run:
        assert run.agents[0].wait(timeout=300) == 0, run.message()
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "texts, and which rounds they came from"
    (expected,) = Engine(load("stories"), max_seq_len=64).generate([PROMPT], OPTIONS)
    assert {name: text for name, (text, _) in first.items()} == {
        f"{draft} {count}": list(expected.tokens) for draft in DRAFTS for count in (3, AUTO)
    }
