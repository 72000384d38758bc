"""A model in parts computes what it computes whole: ranks as threads here, as processes in test_tp_processes.py."""

import pytest
import torch

from fastgen.engine import Engine
from fastgen.errors import RankLostError
from fastgen.options import GenerationOptions
from fastgen.sampling import log_probabilities
from tests.rank_threads import on_ranks
from tests.sharded import CASES, PROMPTS, drafting, logits, part, texts, whole
from tp.dist import Ranks


@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, case in CASES.items() for world in case.worlds], ids=str
)
def test_ranks_together_give_the_logits_of_one(name: str, world: int) -> None:
    model = whole(CASES[name])
    expected = logits(model)
    for found in on_ranks(world, lambda ranks: logits(part(model, ranks))):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_sampled_batch_is_the_same_on_three_ranks() -> None:
    model = whole(CASES["259 tokens"])
    expected = texts(model)
    assert all(found == expected for found in on_ranks(3, lambda ranks: texts(part(model, ranks))))


def test_speculation_gives_the_same_texts_on_three_ranks() -> None:
    case = CASES["259 tokens"]
    model, draft = whole(case), drafting(case)
    expected = texts(model)
    for found in on_ranks(3, lambda ranks: texts(part(model, ranks), part(draft, ranks))):
        assert found == {kind: expected[kind] for kind in found}


def test_log_probabilities_are_those_of_the_whole_vocabulary() -> None:
    model = whole(CASES["259 tokens"])
    tokens = torch.tensor([0, 70, 258, -1, *range(100, 116)])
    expected = log_probabilities(logits(model), tokens)

    def measure(ranks: Ranks) -> torch.Tensor:
        mine = part(model, ranks)
        vocabulary, every = mine.transformer.vocabulary, logits(mine)
        size = mine.transformer.lm_head.weight.shape[0]
        own = every[:, vocabulary.first : vocabulary.first + size]
        return log_probabilities(own, tokens, vocabulary)

    for found in on_ranks(3, measure):
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_rank_whose_sums_differ_is_noticed_by_all() -> None:
    model = whole(CASES["fp32"])

    def generate(ranks: Ranks) -> str:
        mine = part(model, ranks)
        embed = mine.transformer.stages.embed
        mine.transformer.stages.embed = lambda *given: embed(*given) * (1 + 1e-6 * ranks.rank)
        with pytest.raises(RankLostError) as error:
            Engine(mine, max_seq_len=32).generate(PROMPTS[:1], GenerationOptions(max_new_tokens=3))
        return str(error.value)

    assert all("--check-ranks" in message for message in on_ranks(2, generate))
