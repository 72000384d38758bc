"""What graphs are kept for, and where rows lie that graphs read; captures are CUDA's and are stood in for here."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastgen.graphs import Burst, GraphDecoder, Graphs, bounds_below, burst_of
from fastgen.options import SamplingOptions
from fastgen.steps import Steps
from tests.models import random_model


class Rows(NamedTuple):
    """What `GraphDecoder` asks of rows."""

    token: Tensor
    positions: Tensor


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> GraphDecoder:
    """A decoder whose graphs decode nothing: what they give is the tensors that they would read for ever."""

    def capture(self: Graphs, work: Callable[[], Any], state: list[Tensor]) -> tuple[Any, list[Tensor]]:
        return SimpleNamespace(replay=lambda: None), state

    monkeypatch.setattr(Graphs, "_capture", capture)
    return GraphDecoder(lambda: None, 600, bounds_below(600))


def rows_of(texts: int, value: int) -> Rows:
    return Rows(torch.full((texts,), value), torch.arange(texts) + value)


def test_graphs_read_the_rows_that_were_started_last_however_many(decoder: GraphDecoder) -> None:
    for value, (texts, captures) in enumerate([(1, 1), (3, 2), (3, 2), (1, 3), (1, 3)]):
        rows = rows_of(texts, value)
        decoder.start(rows)
        read = decoder.decode(9, 8, None, logprobs=False)
        assert all(map(torch.equal, read, rows)), f"{texts} texts"
        assert not any(map(torch.Tensor.is_set_to, read, rows)), "the caller's rows are not moved on"
        assert decoder.captures == captures, "rows of the same sizes go where the last ones were, and graphs are kept"


def test_there_is_a_graph_for_every_bound_and_choice_and_the_smallest_that_holds_a_text_is_taken(
    decoder: GraphDecoder,
) -> None:
    decoder.start(rows_of(1, 0))
    for filled, options, logprobs, captures in (
        (256, "greedy", False, 1), (1, "greedy", False, 1), (257, "greedy", False, 2), (512, "greedy", False, 2),
        (513, "greedy", False, 3), (600, "greedy", False, 3), (9, "sampled", False, 4), (9, "greedy", True, 5),
    ):  # fmt: skip
        decoder.decode(filled, 8, options, logprobs=logprobs)
        assert decoder.captures == captures, f"{filled} positions, {options}"
    decoder.forget()
    decoder.decode(256, 8, "greedy", logprobs=False)
    decoder.decode(256, 1, "greedy", logprobs=False)
    assert decoder.captures == 7


class Step(NamedTuple):
    """What a step gives."""

    token: Tensor
    logprob: Tensor | None


def test_bursts_and_single_steps_go_on_where_the_last_graph_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """With graphs that do their work at every replay, into the same result."""
    read: list[tuple[int, int]] = []  # by each step: the position it stands at, and how many it attends to

    def step(rows: Rows, bound: int, options: None, *, logprobs: bool) -> Step:
        read.append((int(rows.positions[0]), bound))
        return Step(3 * rows.token + rows.positions, None)

    def capture(self: Graphs, work: Callable[[], Step], state: list[Tensor]) -> tuple[Any, Step]:
        saved = [tensor.clone() for tensor in state]
        result = work()
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        read.clear()
        return SimpleNamespace(replay=lambda: result.token.copy_(work().token)), result

    monkeypatch.setattr(Graphs, "_capture", capture)
    decoder, token, position = GraphDecoder(step, 600, bounds_below(600)), 5, 250
    decoder.start(Rows(torch.tensor([token]), torch.tensor([position])))
    for steps, bound in ((4, 256), (1, 256), (1, 256), (4, 512)):
        found = decoder.decode(position + steps, steps, None, logprobs=False).token
        assert found.shape == (steps, 1)
        assert read == [(position + made, bound) for made in range(steps)]
        read.clear()
        for number in found[:, 0].tolist():
            token, position = 3 * token + position, position + 1
            assert number == token


def test_a_graph_reads_as_far_as_its_last_step_attends_and_no_farther_than_the_cache() -> None:
    asked = []
    steps = Steps(random_model().transformer, 600, compiled=False)
    steps.burst = Burst(8, 1)
    steps._graphs = SimpleNamespace(decode=lambda *arguments, logprobs: asked.append(arguments[:2]))
    for filled, left in ((100, 20), (100, 8), (100, 7), (595, 8), (600, 1)):
        steps.decode(filled, SamplingOptions(), logprobs=False, left=left)
    assert asked == [(107, 8), (107, 8), (100, 1), (600, 8), (600, 1)]


@pytest.mark.parametrize(
    ("gigabytes", "burst"),
    [
        (0.1, Burst(8, 8)),
        (1.9, Burst(8, 8)),
        (2, Burst(8, 1)),
        (8, Burst(8, 1)),
        (13.5, Burst(4, 1)),
        (140, Burst(2, 1)),
    ],
)
def test_the_larger_a_model_the_shorter_its_bursts_and_a_small_one_makes_no_single_steps(
    gigabytes: float, burst: Burst
) -> None:
    assert burst_of(int(gigabytes * 2**30)) == burst


def test_a_burst_is_made_while_there_is_need_of_all_of_it() -> None:
    assert [Burst(4, 1).steps(left) for left in (9, 4, 3, 1, 0, -5)] == [4, 4, 1, 1, 1, 1]


def test_no_garbage_is_collected_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage may hold another graph, whose end would spoil the capture: on several ranks it did."""

    @contextlib.contextmanager
    def capture(graph: object, pool: object = None) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "graph_pool_handle": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(), "CUDAGraph": SimpleNamespace, "graph": capture,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    collecting: list[bool] = []
    Graphs()._capture(lambda: collecting.append(gc.isenabled()), [])
    assert collecting == [True, False] and gc.isenabled()
