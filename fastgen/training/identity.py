"""What a run's losses follow from, by name: what a run that goes on must share with the one that was interrupted.

Contents count, not the names under which they were given: a `config.json` or a teacher may have changed in its place.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from fastgen.config import ModelConfig
from fastgen.device import Placement
from fastgen.model import Transformer
from fastgen.training.tokens import TokenData
from fastgen.training.trainer import TrainingOptions

Settings = Mapping[str, object]
"""Of what JSON can hold."""


class Difference(NamedTuple):
    """A setting that is not what it was."""

    name: str
    before: object
    now: object


def settings_of(
    config: ModelConfig,
    options: TrainingOptions,
    data: TokenData,
    placement: Placement,
    *,
    start: Transformer | None,
    teacher: Transformer | None,
    tokenizer: Mapping[str, bytes],
    compile: bool,
    processes: int,
) -> Settings:
    """Return the settings of a run that begins now; `start` is a given model with its first weights."""
    found = {
        **dataclasses.asdict(options),
        "device": placement.device.type,
        "precision": str(placement.dtype).removeprefix("torch."),
        "compile": compile,
        "processes": processes,
        **{f"model {name}": value for name, value in dataclasses.asdict(config).items()},
        "tokens": data.fingerprint(),
        "tokenizer": _digest(tokenizer.items()) if tokenizer else None,
        "first weights": _digest_of(start) if start else None,
        "teacher": _digest_of(teacher) if teacher else None,
    }
    return dict(json.loads(json.dumps(found)))  # tuples are lists there


def first_difference(before: Settings, now: Settings) -> Difference | None:
    """Return the first setting in which a run that was begun differs from one that is to go on."""
    for name in (*now, *before):
        if before.get(name) != now.get(name):
            return Difference(name, before.get(name), now.get(name))
    return None


def _digest_of(model: Transformer) -> str:
    tensors = ((name, tensor.detach().cpu().contiguous()) for name, tensor in model.state_dict().items())
    return _digest((name, tensor.view(-1).view(torch.uint8).numpy().data) for name, tensor in tensors)


def _digest(parts: Iterable[tuple[str, bytes | memoryview]]) -> str:
    digest = hashlib.sha256()
    for name, data in parts:
        digest.update(f"{name} {len(data)}\n".encode())
        digest.update(data)
    return f"sha256 {digest.hexdigest()[:16]}"
