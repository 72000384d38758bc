"""A model in parts computes what it computes whole: ranks as threads here, as processes in test_tp_processes.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastgen.engine import Engine
from fastgen.errors import RankLostError
from fastgen.kernels import reference
from fastgen.load import LoadedModel, load_model
from fastgen.model import Transformer
from fastgen.options import GenerationOptions
from fastgen.sampling import log_probabilities
from fastgen.steps import covered_by_kernels, most_bytes
from quantize.run import main as quantize
from tests.rank_threads import on_ranks
from tests.sharded import CASES, PROMPTS, drafting, logits, part, texts, whole
from tp.apply import ShardedStages
from tp.dist import Ranks


@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, case in CASES.items() for world in case.worlds], ids=str
)
def test_ranks_together_give_the_logits_of_one(name: str, world: int) -> None:
    model = whole(CASES[name])
    expected = logits(model)
    for found in on_ranks(world, lambda ranks: logits(part(model, ranks))):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flags", [("int8",), ("int4", "--group-size", "64")], ids=" ".join)
def test_parts_of_quantized_files_give_the_logits_of_the_whole(flags: tuple[str, ...], tmp_path: Path) -> None:
    assert (
        quantize(["--model", "stories-draft", "--out", str(tmp_path / "q"), "--device", "cpu", "--quant", *flags]) == 0
    )
    model = load_model(tmp_path / "q", device="cpu", dtype="fp32")
    expected = logits(model)
    for found in on_ranks(4, lambda ranks: logits(part(model, ranks))):
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


def disturb(model: LoadedModel, what: str, rank: int) -> None:
    """Let one rank find other sums, other logits, the same in another order, or another token."""
    stages, vocabulary = model.transformer.stages, model.transformer.vocabulary
    embed, join, check = stages.embed, vocabulary.join, vocabulary.check
    if what == "sums":
        stages.embed = lambda *given: embed(*given) * (1 + 1e-6 * rank)
    elif what == "logits":
        vocabulary.join = lambda logits: join(logits) * (1 + 1e-6 * rank)
    elif what == "order":
        vocabulary.join = lambda logits: join(logits).roll(rank, -1)
    else:
        vocabulary.check = lambda token, *given: check(token + rank, *given)


@pytest.mark.parametrize("what", ["sums", "logits", "order", "token"])
def test_ranks_that_differ_are_noticed_by_all(what: str) -> None:
    model = whole(CASES["fp32"])

    def generate(ranks: Ranks) -> str:
        mine = part(model, ranks)
        disturb(mine, what, ranks.rank)
        with pytest.raises(RankLostError) as error:
            Engine(mine, max_seq_len=32).generate(PROMPTS[:1], GenerationOptions(max_new_tokens=3))
        return str(error.value)

    assert all("--check-ranks" in message for message in on_ranks(2, generate))


def test_all_ranks_make_as_many_steps_at_a_time() -> None:
    model = whole(CASES["9/3 heads"])

    def measure(ranks: Ranks) -> tuple[int, int]:
        mine = part(model, ranks).transformer
        return mine.weight_bytes(), most_bytes(mine)

    (one, most), (another, agreed) = on_ranks(2, measure)
    assert one != another and most == agreed == max(one, another)


def test_a_share_is_covered_by_kernels_where_those_of_all_ranks_are() -> None:
    model = whole(CASES["fp32"])

    class Kernels:
        """The reference's stages, said to cover one text, and on rank 0 two."""

        def __init__(self, rank: int) -> None:
            self.most = 2 - rank

        def __getattr__(self, name: str) -> object:
            return getattr(reference, name)

        def covers(self, transformer: Transformer, head_dim: int, tokens: int) -> bool:
            return transformer.config.dim == model.config.dim and tokens <= self.most

    def covered(ranks: Ranks) -> list[bool]:
        mine = part(model, ranks)
        assert not covered_by_kernels(mine.transformer, 1), "the reference is no kernel"
        mine.transformer.stages = ShardedStages(Kernels(ranks.rank), mine.plan, ranks)
        return [covered_by_kernels(mine.transformer, batch) for batch in (1, 2)]

    assert on_ranks(2, covered) == [[True, False]] * 2


def test_products_of_linked_ranks_add_up_over_the_ranks_themselves() -> None:
    model = whole(CASES["fp32"])

    class Posting:
        """The reference's stages, and one that sums by itself and counts how often it did."""

        def __init__(self) -> None:
            self.posted = 0

        def __getattr__(self, name: str) -> object:
            return getattr(reference, name)

        def linear_sum_add(self, x: Tensor, linear: nn.Module, to: Tensor, sum_add: Callable[..., Tensor]) -> Tensor:
            self.posted += 1
            return sum_add(reference.partial_linear(x, linear), to)

    def count(ranks: Ranks) -> list[int]:
        mine, counts = part(model, ranks), []
        expected = logits(mine)
        for linked in (False, True):
            ranks.linked, stages = linked, Posting()
            mine.transformer.stages = ShardedStages(stages, mine.plan, ranks)
            assert torch.equal(logits(mine), expected)
            counts.append(stages.posted)
        return counts

    layers = model.config.n_layers
    assert all(none == 0 and some > 0 and some % (2 * layers) == 0 for none, some in on_ranks(2, count))
