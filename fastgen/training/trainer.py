"""The training loop: AdamW, warm-up and cosine, accumulation, clipping, bf16, DDP; and its state, to go on from.

    trainer = Trainer(model, data, options, placement)
    while trainer.step < options.steps:
        trainer.advance(min(trainer.step + 10, options.steps))
        print(trainer.losses[-1], trainer.validate().loss)

Everything a step does follows from the state, the options and the step's number: the rows (`windows`), the learning
rate. So a run that was interrupted and resumed gives the same losses as one that was not. The host does not wait for
the device within a stretch of steps; losses and norms are looked at when the stretch ends, before anything is saved.
"""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastgen.device import Placement
from fastgen.errors import UsageError
from fastgen.model import Transformer
from fastgen.training.objective import Distillation, NextToken, measure
from fastgen.training.ranks import Ranks
from fastgen.training.tokens import TokenData
from fastgen.training.windows import Windows, side_by_side

BETAS = (0.9, 0.95)  # of LLaMA (arXiv 2302.13971, section 2.3), as the decay of the learning rate to a tenth
FINAL_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How to train. Raises `UsageError` that names the flag of the same name.

    Attributes:
        steps: optimizer steps.
        batch_size: rows of a step, over all processes; they come in `accumulate` equal parts.
        context: tokens of a row.
        learning_rate: at its highest, after `warmup` steps; it ends at a tenth of that.
        weight_decay: of matrices; norms and biases have none.
        clip: the largest norm that the gradient keeps.
        distill_temperature: of both distributions when a teacher is followed.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    context: int = 256
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    distill_temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("steps", self.steps >= 1, "at least 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
            (
                "accumulate",
                self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
                f"a divisor of --batch-size {self.batch_size}",
            ),
            ("context", self.context >= 2, "at least 2"),
            # The bounds keep a step's products from overflow, which PyTorch refuses in numbers of Python.
            ("learning_rate", 0 < self.learning_rate <= 1e30, "a number above 0, up to 1e30"),
            ("warmup", self.warmup >= 0, "a number of steps"),
            ("weight_decay", 0 <= self.weight_decay <= 1e6, "a number from 0 to 1e6"),
            ("clip", self.clip > 0, "a number above 0 (inf clips nothing)"),
            ("distill_temperature", 1e-6 <= self.distill_temperature <= 1e6, "1e-6 to 1e6"),
            ("seed", -(2**63) <= self.seed < 2**63, "a signed 64-bit integer"),
        )
        for name, fine, expected in checks:
            if not fine:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected {expected}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (FINAL_SHARE + (1 - FINAL_SHARE) * (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Validation:
    """Means over the validation tokens, after `step` steps: cross-entropy in nats and, with a teacher, the divergence
    from it and the share of positions where both models' likeliest tokens agree."""

    step: int
    loss: float
    divergence: float | None = None
    agreement: float | None = None


class Trainer:
    """One run: a model whose stages are causal, on its device, and what becomes of it."""

    def __init__(
        self,
        model: Transformer,
        data: TokenData,
        options: TrainingOptions,
        placement: Placement,
        *,
        teacher: Transformer | None = None,
        ranks: Ranks | None = None,
        compile: bool = False,
    ) -> None:
        self.model, self.options, self.teacher = model, options, teacher
        self.ranks = ranks or Ranks()
        if options.batch_size % (options.accumulate * self.ranks.world):
            raise UsageError(
                f"--batch-size {options.batch_size}: not a multiple of --accumulate {options.accumulate} times "
                f"{self.ranks.world} processes"
            )
        if placement.dtype == torch.float16:
            raise UsageError("--dtype fp16: gradients would vanish in it; train in bf16 or fp32")
        self.step = 0
        self.losses: list[float] = []
        self._share = options.batch_size // (options.accumulate * self.ranks.world)  # rows at a time
        self._device, self._dtype = placement.device, placement.dtype
        self._windows = Windows(data.training, options.context, options.seed)
        self._validation = side_by_side(data.validation, options.context)
        self._parameters = dict(model.named_parameters())
        self._optimizer = self._make_optimizer()
        self._objective = self._make_objective(compile)

    def advance(self, until: int) -> None:
        """Train up to `until` steps in all, and add their losses to `losses`.

        Raises `UsageError` that names the step if a loss or a gradient is not finite; the weights are lost then.
        """
        self.model.train()
        seen = [self._train_step(step) for step in range(self.step, until)]
        means = self.ranks.total(torch.stack(seen)) / self.ranks.world
        for step, (loss, norm) in enumerate(means.tolist(), start=self.step):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise self._diverged(f"step {step + 1}: the loss is {loss:.4g}, the gradient's norm {norm:.4g}")
            self.losses.append(loss)
        self.step = until

    def check(self) -> None:
        """Raise `UsageError` if the state or its loss is not finite; no loss has shown yet what the last update did."""
        rows = self._validation[: self._share].to(self._device)
        with self._precision():
            loss = measure(self.model, self.teacher, rows).sums
        finite = torch.stack([tensor.isfinite().all().to(self._device) for tensor in (loss, *self.state().values())])
        if not finite.all():
            raise self._diverged(f"step {self.step}: the weights or their loss are no longer finite")

    def validate(self) -> Validation:
        """Return the model's figures on the validation tokens; raises `UsageError` if they are not finite."""
        self.model.eval()
        sums = torch.zeros(3 if self.teacher else 1, dtype=torch.float64, device=self._device)
        tokens = 0
        for start in range(0, self._validation.shape[0], self._share):
            if (start // self._share) % self.ranks.world == self.ranks.rank:
                rows = self._validation[start : start + self._share].to(self._device)
                with self._precision():
                    part = measure(self.model, self.teacher, rows)
                sums += part.sums
                tokens += part.tokens
        counted = self.ranks.total(torch.cat((sums, sums.new_tensor([tokens]))))
        figures = (counted[:-1] / counted[-1]).tolist()
        if not all(map(math.isfinite, figures)):
            raise self._diverged(f"step {self.step}: the validation loss is {figures[0]:.4g}")
        return Validation(self.step, *figures)

    def state(self) -> dict[str, Tensor]:
        """Return the weights and the optimizer's moments, fp32, by the parameters' names, as they are now."""
        tensors = {f"model.{name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        return tensors

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all that `state()` holds once a step is done."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, parameter in self._parameters.items():
            own = tuple(parameter.shape)
            shapes |= {f"model.{name}": own, f"optimizer.{name}.step": ()}
            shapes |= {f"optimizer.{name}.exp_avg": own, f"optimizer.{name}.exp_avg_sq": own}
        return shapes

    def restore(self, tensors: Mapping[str, Tensor], losses: list[float]) -> None:
        """Go on from a `state()` that was taken after as many steps as there are `losses`."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
                prefix = f"optimizer.{name}."
                moments = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
                self._optimizer.state[parameter] = {
                    key: value.to(parameter.device if value.dim() or parameter.is_cuda else "cpu", copy=True)
                    for key, value in moments.items()
                }
        self.losses, self.step = list(losses), len(losses)

    def _train_step(self, step: int) -> Tensor:
        """Train one step; returns its loss on this process's rows and the gradient's norm, [2] fp32 on the device."""
        options = self.options
        loss = torch.zeros((), device=self._device)
        for part in range(options.accumulate):
            first = step * options.batch_size + (part * self.ranks.world + self.ranks.rank) * self._share
            rows = self._windows.rows(first, self._share)
            if self._device.type == "cuda":
                rows = rows.pin_memory().to(self._device, non_blocking=True)
            with self._unsynced(last=part == options.accumulate - 1):
                with self._precision():
                    part_loss = self._objective(rows)
                (part_loss / options.accumulate).backward()
            loss += part_loss.detach() / options.accumulate
        norm = nn.utils.clip_grad_norm_(self._parameters.values(), options.clip, foreach=True)
        for group in self._optimizer.param_groups:
            group["lr"] = options.rate(step)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return torch.stack((loss, norm))

    def _diverged(self, what: str) -> UsageError:
        return UsageError(
            f"{what}: training has diverged\n"
            f"Lower --learning-rate ({self.options.learning_rate:g}), or raise --warmup ({self.options.warmup})"
        )

    def _make_optimizer(self) -> torch.optim.AdamW:
        matrices = [parameter for parameter in self._parameters.values() if parameter.dim() >= 2]
        others = [parameter for parameter in self._parameters.values() if parameter.dim() < 2]
        groups = [
            {"params": matrices, "weight_decay": self.options.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        rate = self.options.learning_rate
        return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=self._device.type == "cuda")

    def _make_objective(self, compile: bool) -> nn.Module:
        objective: nn.Module = NextToken(self.model)
        if self.teacher is not None:
            objective = Distillation(self.model, self.teacher, self.options.distill_temperature)
        if compile:
            objective.compile(dynamic=False)
        if self.ranks.world > 1:
            objective = DistributedDataParallel(objective)
        return objective

    def _precision(self) -> AbstractContextManager[object]:
        """Return the context in which weights stay fp32 and matrix products run in the training's precision."""
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=self._dtype)

    def _unsynced(self, *, last: bool) -> AbstractContextManager[object]:
        """Return the context of one part of a batch: processes exchange gradients with the last."""
        if isinstance(self._objective, DistributedDataParallel) and not last:
            return self._objective.no_sync()
        return nullcontext()
