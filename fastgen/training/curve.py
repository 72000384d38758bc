"""The loss curve of a run, as a picture (the optional extra `plot`)."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from fastgen.errors import UsageError
from fastgen.training.trainer import Validation


def can_draw() -> bool:
    """Return whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_curve(path: Path, losses: Sequence[float], validations: Sequence[Validation], title: str) -> None:
    """Write a PNG of the training loss by step, with the same quantity on the validation tokens on it.

    That is the divergence where a teacher is followed, and the cross-entropy elsewhere.

    Raises `UsageError` without matplotlib.
    """
    if not can_draw():
        raise UsageError("a loss curve needs matplotlib: pip install 'fastgen[plot]'")
    from matplotlib.figure import Figure  # noqa: PLC0415  (an optional extra)

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, linewidth=0.8, alpha=0.7, label="training")
    measured = [entry.loss if entry.divergence is None else entry.divergence for entry in validations]
    axes.plot([entry.step for entry in validations], measured, "o-", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=120)
