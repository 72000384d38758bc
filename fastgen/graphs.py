"""Decoding as CUDA graphs: several steps a launch, with nothing for the host to do in between.

A graph has fixed addresses and fixed sizes. The rows (last token, position, noise) therefore live in static tensors
that the steps themselves move on, and attention reads a fixed number of positions, its bound: one graph for every
power of two, of which a step takes the smallest that holds its text. All graphs share one pool of memory.

A graph of several steps costs one launch, so the host keeps ahead of models whose step takes a fraction of a
millisecond. What was decoded behind the end of a text is thrown away.
"""

from collections.abc import Callable
from typing import Any

import torch

SMALLEST_BOUND = 256
"""Positions that the smallest graph reads; below that attention costs about the same."""

BURST, LONG_STEP_BURST, LONG_STEP_BYTES = 8, 2, 4 << 30
"""Steps a graph, and fewer for models whose step takes a millisecond or more: a burst arrives as a whole, and a
person should not see text stutter."""


class GraphDecoder:
    """Captures and replays graphs of `burst` steps.

    `step(rows, filled, options, logprobs=...)` makes one step that reads `filled` positions and returns a named tuple
    with `token` and `logprob` (or None), [B] each; `rows` is a named tuple of tensors with `token` and `positions`.
    """

    def __init__(self, step: Callable[..., Any], reach: int, weight_bytes: int) -> None:
        self.burst = BURST if weight_bytes < LONG_STEP_BYTES else LONG_STEP_BURST
        powers = [SMALLEST_BOUND << power for power in range(32) if SMALLEST_BOUND << power < reach]
        self.bounds = [*powers, reach]
        self.captures = 0
        self._step = step
        self._reach = reach
        self._rows: Any = None
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool: Any = None

    def forget(self) -> None:
        """Drop all graphs: the tensors that they read are gone."""
        self._graphs.clear()

    def start(self, rows: Any) -> None:
        """Begin to decode from `rows`, whose values are copied to where the graphs look for them."""
        if self._rows is None or any(old.shape != new.shape for old, new in zip(self._rows, rows, strict=True)):
            self._rows = type(rows)(*(tensor.clone() for tensor in rows))
            self._graphs.clear()
            return
        for old, new in zip(self._rows, rows, strict=True):
            old.copy_(new)

    def decode(self, filled: int, options: Any, *, logprobs: bool) -> Any:
        """Decode `burst` tokens, whose last attends to `filled` positions; the result, [burst, B] each, is
        overwritten by the next call: copies that are queued before it are safe."""
        bound = next(bound for bound in self.bounds if bound >= filled)
        case = (bound, options, logprobs)
        if case not in self._graphs:
            self._graphs[case] = self._capture(*case)
            self.captures += 1
        graph, choices = self._graphs[case]
        graph.replay()
        return choices

    def _capture(self, bound: int, options: Any, logprobs: bool) -> tuple[torch.cuda.CUDAGraph, Any]:
        saved = [tensor.clone() for tensor in self._rows]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles and tunes what a capture must find ready
            self._steps(bound, options, logprobs, count=1)
        torch.cuda.current_stream().wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            choices = self._steps(bound, options, logprobs, count=self.burst)
        for tensor, before in zip(self._rows, saved, strict=True):
            tensor.copy_(before)
        return graph, choices

    def _steps(self, bound: int, options: Any, logprobs: bool, *, count: int) -> Any:
        rows, choices = self._rows, []
        for _ in range(count):
            choice = self._step(rows, bound, options, logprobs=logprobs)
            following = (rows.positions + 1).clamp(max=self._reach - 1)
            rows = rows._replace(token=choice.token, positions=following)
            choices.append(choice)
        self._rows.token.copy_(rows.token)
        self._rows.positions.copy_(rows.positions)
        logprob = torch.stack([choice.logprob for choice in choices]) if logprobs else None
        return type(choices[0])(torch.stack([choice.token for choice in choices]), logprob)
