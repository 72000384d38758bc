"""How true a model's stages are: one text, read by several forms of the same weights in the way that they decode.

    exact = read(widened(model), tokens, chunk=16, width=512)   # fp32: what is right
    found = read(model, tokens, chunk=16, width=512)
    distance(found.logits, exact.logits), perplexity_change(exact, found)

A text is read in windows of `width` tokens, each in steps of `chunk` tokens that append to a cache. On CUDA the steps
are replays of one graph, as in decoding: that is fast enough for whole texts a token at a time, and it is where kernels
that overlap can go wrong.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.graphs import Graphs
from fastgen.kernels import reference
from fastgen.load import LoadedModel
from fastgen.options import SamplingOptions
from fastgen.stage_times import greedy_rows
from fastgen.steps import decode_one_token
from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear


class Reading(NamedTuple):
    """What a model makes of a text of N tokens in windows of W.

    Attributes:
        logits: [min(N, W), V] fp32, of the first window.
        losses: [M] fp32, nats of every token that has one before it in its window.
        best: [N] int64, the likeliest token behind each token.
    """

    logits: Tensor
    losses: Tensor
    best: Tensor

    @property
    def perplexity(self) -> float:
        """Of the tokens that have a loss."""
        return float(self.losses.double().mean().exp())


def widened(model: LoadedModel) -> LoadedModel:
    """Return the model with the very same weights, scales and zero points, computing in fp32 with PyTorch's stages."""
    stages = model.transformer.stages  # a module: shared, not copied
    transformer = copy.deepcopy(model.transformer, {id(stages): stages}).float()
    transformer.stages = reference
    for module in transformer.modules():
        if isinstance(module, Int4Linear | Int8Linear):
            module.cpu_product = None  # it may round x to bf16
    return replace(model, transformer=transformer, placement=replace(model.placement, dtype=torch.float32))


@torch.inference_mode()
def read(model: LoadedModel, tokens: Sequence[int], *, chunk: int, width: int, compiled: bool = False) -> Reading:
    """Read a text of at least two tokens in steps of `chunk`; `compiled`, by torch.compile (PyTorch's stages only).

    The model's cache is replaced.
    """
    steps = _Steps(model, chunk, width, compiled)
    ids = torch.tensor(tokens, device=model.placement.device)
    first: list[Tensor] = []
    losses, best = [], []
    for start in range(0, len(tokens), width):
        window = ids[start : start + width]
        for at, logits in steps.read(window):
            if start == 0:
                first.append(logits.clone())
            best.append(logits.argmax(1))
            targets = window[at + 1 : at + 1 + chunk]
            losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none"))
    return Reading(torch.cat(first), torch.cat(losses), torch.cat(best))


@torch.inference_mode()
def choices(model: LoadedModel, tokens: Sequence[int], *, width: int) -> Tensor:
    """Return the likeliest token behind each token of a text, [N] int64, by the very step that decodes.

    That step may have kernels of its own, which `read` would not see. The model's cache is replaced.
    """
    device, transformer = model.placement.device, model.transformer
    transformer.allocate_cache(1, width)
    keys, rows, ids = torch.arange(width, device=device), greedy_rows(device), torch.tensor(tokens, device=device)
    graphs = Graphs() if device.type == "cuda" else None

    def step() -> Tensor:
        return decode_one_token(transformer, rows, keys, SamplingOptions(), logprobs=False).token

    found = []
    for place in range(len(tokens)):
        rows.token.copy_(ids[place : place + 1])
        rows.positions.fill_(place % width)
        found.append(graphs.run("step", step, ()).clone() if graphs else step())
    return torch.cat(found)


class _Steps:
    """Steps of so many tokens of one text, in static tensors."""

    def __init__(self, model: LoadedModel, chunk: int, width: int, compiled: bool) -> None:
        self._chunk, device, transformer = chunk, model.placement.device, model.transformer
        reach = -(-width // chunk) * chunk  # the last step of a window is padded
        transformer.allocate_cache(1, reach)
        self._ids = torch.zeros(1, chunk, dtype=torch.int64, device=device)
        self._positions = torch.arange(chunk, device=device)[None]
        keys, length = torch.arange(reach, device=device), torch.tensor([reach], device=device)

        def step(ids: Tensor, positions: Tensor) -> Tensor:
            return transformer.logits(transformer(ids, positions, keys, length))[0]

        if compiled:
            torch._dynamo.reset()  # of another model's steps, which share this code
            step = torch.compile(step, fullgraph=True, dynamic=False)
        self._step = step
        self._graphs = Graphs() if device.type == "cuda" else None

    def read(self, window: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield where each step of a window [T] begins, and its logits [up to chunk, V], which the next overwrites."""
        for at in range(0, len(window), self._chunk):
            part = window[at : at + self._chunk]
            self._ids[0, : len(part)] = part
            torch.arange(at, at + self._chunk, out=self._positions[0])
            yield at, self._run()[: len(part)]

    def _run(self) -> Tensor:
        if self._graphs is None:
            return self._step(self._ids, self._positions)
        return self._graphs.run("step", lambda: self._step(self._ids, self._positions), ())


def distance(actual: Tensor, exact: Tensor) -> float:
    """Return the relative RMS error of logits."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def perplexity_change(before: Reading, after: Reading) -> tuple[float, float]:
    """Return by which part the perplexity of a text changes, and that figure's standard error.

    The losses are compared token by token, so what both find hard or easy cancels.
    """
    difference = after.losses.double() - before.losses.double()
    error = difference.std() / len(difference) ** 0.5
    return float(difference.mean().expm1()), float(error)
