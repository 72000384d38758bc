"""Small runs of the train command, for tests."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fastgen.train import main
from fastgen.training.trainer import Trainer

TEXT = "A little dog saw a big ball. The ball was red, and the dog was happy.\n" * 60


def flags(folder: Path, *more: str) -> list[str]:
    """A small run in `folder` that saves and measures every second of its six steps."""
    if not (folder / "text.txt").exists():
        (folder / "text.txt").write_text(TEXT)
    return [
        "--text", str(folder / "text.txt"), "--train-tokenizer", "290", "--shape", "dim=32,layers=2,heads=4,kv-heads=2",
        "--context", "16", "--batch-size", "4", "--steps", "6", "--warmup", "2", "--save-every", "2",
        "--validate-every", "2", "--device", "cpu", "--dtype", "fp32", "--json", "--out", str(folder / "out"), *more,
    ]  # fmt: skip


def without(words: list[str], flag: str) -> list[str]:
    """The flags less one and its value."""
    at = words.index(flag)
    return words[:at] + words[at + 2 :]


def document(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(words) == 0
    return dict(json.loads(capsys.readouterr().out.splitlines()[-1]))


def interrupt(words: list[str], step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and press Ctrl-C once `step` steps are done."""
    advance = Trainer.advance

    def failing(self: Trainer, until: int) -> None:
        if self.step >= step:
            raise KeyboardInterrupt
        advance(self, until)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", failing)
        with pytest.raises(KeyboardInterrupt):
            main(words)


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """A disk on which no file can grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
