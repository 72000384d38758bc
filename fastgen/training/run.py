"""A run under way: its trainer, its folder, and what it says of itself."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from fastgen.device import Placement, describe
from fastgen.errors import CapacityError
from fastgen.tokenizer.base import Tokenizer
from fastgen.training.cost import measure_flop_rate, training_flops
from fastgen.training.run_folder import Progress, RunFolder
from fastgen.training.sample import sample_text
from fastgen.training.tokens import MAX_VALIDATION_TOKENS, TokenData
from fastgen.training.trainer import Trainer, Validation


@dataclass
class Run:
    """What the command holds of a run; in parallel every process has one, and the leading one writes."""

    trainer: Trainer
    folder: RunFolder
    data: TokenData
    placement: Placement
    tokenizer: Tokenizer | None
    validations: list[Validation] = field(default_factory=list)
    seconds: float = 0.0  # of training alone, those before an interruption included
    last_sample: str = ""
    _started: int = 0  # the step that this process began with
    _warm: tuple[int, float] | None = None  # step and seconds after the first stretch, which compiles
    _saved: int | None = None
    _finished: bool = False

    def __post_init__(self) -> None:
        self._flop_rate = measure_flop_rate(self.placement.device, self.placement.dtype)

    def resume(self) -> None:
        """Go on from what the folder holds."""
        progress = self.folder.resume(self.trainer)
        self.validations, self.seconds = progress.validations, progress.seconds
        self._saved = self._started = self.trainer.step

    def advance(self, until: int) -> None:
        """Train up to `until` steps in all; raises `CapacityError` if there is not the memory for it."""
        start = time.perf_counter()
        first = self.trainer.step == self._started
        try:
            self.trainer.advance(until)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"out of memory on {self.placement.device} after step {self.trainer.step}: {error!s:.100}\n"
                "Use a higher --accumulate, or a smaller --context or model"
            ) from error
        self.seconds += time.perf_counter() - start
        if first:
            self._warm = (self.trainer.step, self.seconds)

    def validate(self) -> str:
        """Measure on the validation tokens and return the figures as a line."""
        found = self.trainer.validate()
        self.validations.append(found)
        line = f"step {found.step}: validation loss {found.loss:.4f}"
        if found.divergence is not None:
            line += f", divergence {found.divergence:.4f}, top-1 agreement {found.agreement:.1%}"
        return line

    def save(self, *, finished: bool) -> None:
        """Put the run's present state into its folder; raises `UsageError` for one that has diverged."""
        self.trainer.check()
        if self.trainer.ranks.leads:
            self.folder.save(self.trainer, Progress(self.validations, self.seconds), finished=finished)
        self._saved, self._finished = self.trainer.step, finished
        self.trainer.ranks.wait()

    def sample(self) -> str:
        """Return what the model writes now, or why it writes nothing."""
        if not self.trainer.ranks.leads:
            return ""
        if self.tokenizer is None:
            return "no text, since it has no tokenizer; later commands take one with --tokenizer"
        self.last_sample = sample_text(self.trainer.model, self.tokenizer, self.trainer.options.seed)
        return self.last_sample

    def tokens_per_second(self) -> float | None:
        """Return the speed of training, over all processes, without the first stretch; None before there is one."""
        if self._warm is None:
            return None
        steps, seconds = self.trainer.step - self._warm[0], self.seconds - self._warm[1]
        options = self.trainer.options
        return steps * options.batch_size * options.context / seconds if steps and seconds > 0 else None

    def mfu(self) -> float | None:
        """Return the share of the measured arithmetic rate of all devices that the model's own products take."""
        speed = self.tokens_per_second()
        if speed is None:
            return None
        flops = training_flops(self.trainer.model, self.trainer.teacher, self.trainer.options.context)
        return speed * flops / (self._flop_rate * self.trainer.ranks.world)

    def figures(self) -> str:
        """Return the last loss, the speed and the utilization."""
        line = f"loss {self.trainer.losses[-1]:.4f}"
        speed, share = self.tokens_per_second(), self.mfu()
        if speed is not None and share is not None:
            line += f"  {speed:,.0f} tok/s  MFU {share:.1%}"
        return line

    def describe(self) -> str:
        """Return what is trained, on what, where."""
        options, world = self.trainer.options, self.trainer.ranks.world
        most = ", the most" if self.data.validation.size == MAX_VALIDATION_TOKENS else ""
        return (
            f"{self.parameters() / 1e6:.2f}M parameters, {self.data.training.size:,} tokens "
            f"(and {self.data.validation.size:,} to measure on{most}), {options.steps} steps of {options.batch_size} x "
            f"{options.context}; {str(self.placement.dtype).removeprefix('torch.')} ({self.placement.reason}), "
            f"{world} x {describe(self.placement.device)}, {self._flop_rate / 1e12:.2f} TFLOP/s measured"
        )

    def document(self) -> dict[str, object]:
        """Return the run's results for JSON."""
        losses: Sequence[float] = self.trainer.losses
        return {
            "parameters": self.parameters(),
            "training_tokens": int(self.data.training.size),
            "validation_tokens": int(self.data.validation.size),
            "losses": losses,
            "validations": [vars(entry) for entry in self.validations],
            "train_seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second(),
            "mfu": self.mfu(),
            "measured_flops_per_second": self._flop_rate,
            "sample": self.last_sample,
        }

    def parameters(self) -> int:
        """Return the number of the model's parameters, tied ones once."""
        return sum(parameter.numel() for parameter in self.trainer.model.parameters())

    def what_is_saved(self) -> str:
        """Return which state a run that fails now leaves, as a sentence."""
        if self._saved is None:
            return f"Nothing was saved yet in {self.folder.path}"
        if self._finished:
            return f"The finished model is in {self.folder.path}"
        return f"The run as of step {self._saved} is in {self.folder.path}; --resume goes on from there"
