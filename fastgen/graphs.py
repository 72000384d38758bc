"""Decoding as CUDA graphs: several steps a launch, with nothing for the host to do in between.

A graph has fixed addresses and fixed sizes. The rows (last token, position, noise) therefore live in static tensors
that the steps themselves move on, and attention reads a fixed number of positions, its bound: one graph for every
power of two, of which a step takes the smallest that holds its text. All graphs share one pool of memory.

A graph of several steps costs one launch, so the host keeps ahead of models whose step takes a fraction of a
millisecond. The last tokens of a text are single steps, unless the model is small (`SINGLE_BYTES`): nobody is to wait
for a burst whose first token is all that he needs. What was decoded behind the end of a text is thrown away.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

SMALLEST_BOUND = 256
"""Positions that the smallest graph reads; below that attention costs about the same."""

LONGEST_BURST, SHORTEST_BURST, BURST_BYTES = 8, 2, 64 << 30
"""Steps a graph: the more, the less it costs to begin one; but a burst arrives as a whole, and a person should not see
text stutter. So many bytes of weights take an H200 16 ms to read."""

SINGLE_BYTES = 2 << 30
"""Weights from which on a text's last tokens are single steps: an H200 takes half a millisecond to read them, and
meanwhile the host can read a step and begin another."""

Result = TypeVar("Result")


def bounds_below(reach: int) -> list[int]:
    """Return the bounds of attention for which graphs are captured, `reach` the last."""
    powers = [SMALLEST_BOUND << power for power in range(32) if SMALLEST_BOUND << power < reach]
    return [*powers, reach]


class Graphs:
    """Captures work on first sight of its case and replays it from then on."""

    def __init__(self) -> None:
        self.captures = 0
        self._graphs: dict[object, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Drop all graphs: the tensors that they read are gone."""
        self._graphs.clear()
        self._pool = None  # PyTorch refuses captures in a pool whose graphs are gone while somebody holds a result

    def run(self, case: object, work: Callable[[], Result], state: Iterable[Tensor]) -> Result:
        """Do `work`, which reads static tensors alone and moves those of `state` on.

        Its result stands where the graph put it and is overwritten by the next run: copies that are queued before are
        safe.
        """
        if case not in self._graphs:
            self._graphs[case] = self._capture(work, list(state))
            self.captures += 1
        graph, result = self._graphs[case]
        graph.replay()
        return result

    def _capture(self, work: Callable[[], Result], state: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, Result]:
        saved = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and tunes what a capture must find ready
            work()
        torch.cuda.current_stream().wait_stream(stream)
        pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with without_collection(), torch.cuda.graph(graph, pool=pool):
            result = work()
        self._pool = pool  # not before: a pool without a graph takes no other
        for tensor, before in zip(state, saved, strict=True):
            tensor.copy_(before)
        return graph, result


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Let Python collect no garbage: a CUDA graph may be among it, and destroying one spoils a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class GraphDecoder:
    """Captures and replays graphs of one step or several.

    `bounds` are the numbers of positions that a graph may read, the last of them `reach`.
    `step(rows, filled, options, logprobs=...)` makes one step that reads `filled` positions and returns a named tuple
    with `token` and `logprob` (or None), [B] each; `rows` is a named tuple of tensors with `token` and `positions`.
    """

    def __init__(self, step: Callable[..., Any], reach: int, bounds: list[int]) -> None:
        self.bounds = bounds
        self._step = step
        self._reach = reach
        self._ahead: Any = None  # 1 .. the longest burst
        self._rows: Any = None
        self._graphs = Graphs()

    @property
    def captures(self) -> int:
        """How many graphs have been captured."""
        return self._graphs.captures

    def forget(self) -> None:
        """Drop all graphs: the tensors that they read are gone."""
        self._graphs.forget()

    def start(self, rows: Any) -> None:
        """Begin to decode from `rows`, whose values are copied to where the graphs look for them."""
        self._rows, moved = settle(self._rows, rows)
        if moved:
            self._graphs.forget()
            self._ahead = torch.arange(1, LONGEST_BURST + 1, device=rows.positions.device)[:, None]

    def decode(self, filled: int, steps: int, options: Any, *, logprobs: bool) -> Any:
        """Make `steps` steps, at most `LONGEST_BURST`, whose last attends to `filled` positions; the result, [steps, B]
        each, is overwritten by the next call: copies that are queued before it are safe."""
        assert steps <= LONGEST_BURST, f"{steps} steps: expected at most {LONGEST_BURST}"
        bound = next(bound for bound in self.bounds if bound >= filled)
        work = partial(self._steps, steps, bound, options, logprobs)
        return self._graphs.run((steps, bound, options, logprobs), work, self._rows)

    def _steps(self, steps: int, bound: int, options: Any, logprobs: bool) -> Any:
        rows, choices = self._rows, []
        ahead = self._ahead[:steps]
        positions = (rows.positions + ahead).clamp(max=self._reach - 1)  # at once: a launch costs a microsecond
        for following in positions:
            choice = self._step(rows, bound, options, logprobs=logprobs)
            rows = rows._replace(token=choice.token, positions=following)
            choices.append(choice)
        self._rows.token.copy_(rows.token)
        self._rows.positions.copy_(rows.positions)
        logprob = torch.stack([choice.logprob for choice in choices]) if logprobs else None
        return type(choices[0])(torch.stack([choice.token for choice in choices]), logprob)


class Burst(NamedTuple):
    """How many steps a graph holds: `most`, or `least` where fewer tokens than `most` are still to come."""

    most: int = 1
    least: int = 1

    def steps(self, left: int) -> int:
        """Return how many steps to make where so many tokens are still to come."""
        return self.most if left >= self.most else self.least

    def sizes(self) -> list[int]:
        """Return the numbers of steps that there are; with so many tokens to come, each is what `steps` returns."""
        return sorted({self.least, self.most})


def burst_of(weight_bytes: int) -> Burst:
    """Return how many steps of a model a graph is to hold."""
    most = LONGEST_BURST
    while most > SHORTEST_BURST and most * weight_bytes > BURST_BYTES:
        most //= 2
    return Burst(most, 1 if weight_bytes >= SINGLE_BYTES else most)


def settle(static: Any, tensors: Any) -> tuple[Any, bool]:
    """Copy a named tuple of tensors to where graphs look for it, and return it there, and whether it had to move.

    `static` is where it stood so far, or None.
    """
    if static is None or any(old.shape != new.shape for old, new in zip(static, tensors, strict=True)):
        return type(tensors)(*(tensor.clone() for tensor in tensors)), True
    for old, new in zip(static, tensors, strict=True):
        old.copy_(new)
    return static, False
