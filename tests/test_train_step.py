"""A training step is what the formulas say: the batch's mean gradient, clipped, AdamW, the schedule, the divergence."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastgen.config import ModelConfig
from fastgen.device import Placement
from fastgen.model import Transformer
from fastgen.training.cost import forward_flops
from fastgen.training.objective import Distillation, divergence, logits_of
from fastgen.training.ranks import Ranks
from fastgen.training.run import Run
from fastgen.training.shape import new_model
from fastgen.training.tokens import TokenData, split
from fastgen.training.trainer import Trainer, TrainingOptions
from fastgen.training.windows import Windows
from tests.models import TINY

CPU = Placement(torch.device("cpu"), torch.float32, "tests")
UNTIED = ModelConfig(**(TINY | {"max_seq_len": 32}))
CONTEXT = 16


def noise(seed: int = 1) -> TokenData:
    tokens = np.random.default_rng(seed).integers(0, 258, 4000).astype(np.uint16)
    return split(tokens, 0.1, CONTEXT, "noise")


def trainer(data: TokenData | None = None, *, teacher: Transformer | None = None, **changes: Any) -> Trainer:
    given = {"steps": 8, "batch_size": 4, "context": CONTEXT, "warmup": 2, "clip": math.inf} | changes
    return Trainer(new_model(UNTIED, 0), data or noise(), TrainingOptions(**given), CPU, teacher=teacher)


def cross_entropy(model: Transformer, rows: Tensor) -> Tensor:
    """The mean over all tokens, written out."""
    probabilities = logits_of(model, rows[:, :-1]).log_softmax(-1)
    return -probabilities.gather(-1, rows[:, 1:, None]).mean()


def gradients(model: Transformer, rows: Tensor) -> dict[str, Tensor]:
    """The whole batch's, from one backward pass."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(cross_entropy(model, rows), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


def moments(run: Trainer) -> dict[str, Tensor]:
    """AdamW's first moments by the parameters' names; after one step they are a tenth of the gradients it was given."""
    suffix, state = ".exp_avg", run.state()
    return {
        name.removeprefix("optimizer.").removesuffix(suffix): state[name] for name in state if name.endswith(suffix)
    }


def assert_near(found: Tensor, expected: Tensor, name: str, tolerance: float = 1e-5) -> None:
    assert (found - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_parts_of_a_batch_give_the_whole_batchs_loss_and_gradient(accumulate: int) -> None:
    rows = Windows(noise().training, CONTEXT, seed=0).rows(0, 4)
    model = new_model(UNTIED, 0)
    expected = gradients(model, rows)
    run = trainer(accumulate=accumulate)
    run.advance(1)
    assert run.losses[0] == pytest.approx(cross_entropy(model, rows).item(), rel=1e-6)
    for name, moment in moments(run).items():
        assert_near(moment / 0.1, expected[name], name)
        assert_near(run.state()[f"optimizer.{name}.exp_avg_sq"] / 0.05, expected[name].square(), name)


@pytest.mark.parametrize("clip", [0.01, 1e6])
def test_a_gradient_keeps_its_direction_and_at_most_the_clipping_norm(clip: float) -> None:
    expected = gradients(new_model(UNTIED, 0), Windows(noise().training, CONTEXT, seed=0).rows(0, 4))
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).norm().item()
    assert 0.01 < norm < 1e6
    run = trainer(clip=clip)
    run.advance(1)
    for name, moment in moments(run).items():
        assert_near(moment / 0.1, expected[name] * min(1, clip / norm), name)


def rate(step: int, *, highest: float, warmup: int, steps: int) -> float:
    """Up in a straight line, then down along half a cosine to a tenth."""
    if step < warmup:
        return highest * (step + 1) / warmup
    angle = math.pi * (step - warmup) / (steps - warmup)
    return highest * (0.55 + 0.45 * math.cos(angle))


@pytest.mark.parametrize("warmup", [0, 3])
def test_every_step_is_taken_at_its_own_learning_rate(warmup: int) -> None:
    run = trainer(warmup=warmup, learning_rate=0.25, weight_decay=1.0)
    for parameter in run.model.parameters():
        parameter.register_hook(torch.zeros_like)  # what is left of a step is its decay, by 1 - rate
    matrix = run.model.get_parameter("layers.0.wo.weight")
    for step in range(8):
        before = matrix.detach().clone()
        run.advance(step + 1)
        expected = 1 - rate(step, highest=0.25, warmup=warmup, steps=8)
        torch.testing.assert_close(matrix.detach(), before * expected, rtol=1e-6, atol=0)


def test_a_run_is_adamw_by_its_formulas() -> None:
    """arXiv 1711.05101, algorithm 2, in fp64 on the gradients of a model that it moves itself."""
    run, model, windows = trainer(accumulate=2, clip=1.0), new_model(UNTIED, 0), Windows(noise().training, CONTEXT, 0)
    parameters = dict(model.named_parameters())
    first = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in parameters.items()}
    second = {name: torch.zeros_like(moment) for name, moment in first.items()}
    for step in range(5):
        found = {name: part.double() for name, part in gradients(model, windows.rows(4 * step, 4)).items()}
        norm = torch.cat([gradient.flatten() for gradient in found.values()]).norm().item()
        learning_rate = rate(step, highest=1e-3, warmup=2, steps=8)
        for name, parameter in parameters.items():
            gradient = found[name] * min(1, 1 / norm)
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient.square()
            direction = (first[name] / (1 - 0.9 ** (step + 1))) / (
                (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            )
            decay = 0.1 if parameter.dim() == 2 else 0.0
            with torch.no_grad():
                parameter.copy_(parameter.double() * (1 - learning_rate * decay) - learning_rate * direction)
    start = dict(new_model(UNTIED, 0).named_parameters())
    run.advance(5)
    for name, parameter in run.model.named_parameters():
        assert_near((parameter - start[name]).detach(), (parameters[name] - start[name]).detach(), name, 1e-3)


def test_only_training_tokens_train_and_only_validation_tokens_measure() -> None:
    random = np.random.default_rng(3)
    data = TokenData(random.integers(0, 100, 2000).astype(np.uint16), random.integers(100, 258, 200).astype(np.uint16))
    run = trainer(data)
    run.advance(3)
    seen = moments(run)["embedding.weight"].abs().sum(1) > 0
    assert not seen[100:].any() and seen[:100].float().mean() > 0.5
    rows = torch.tensor([data.validation[at : at + 17].tolist() for at in range(0, 183, 16)])
    assert len(rows) == 12
    found = run.validate().loss
    assert found == pytest.approx(cross_entropy(run.model, rows).item(), rel=1e-6)


def kl(wanted: Tensor, given: Tensor) -> Tensor:
    """The sum of p log(p / q) in fp64, of logits."""
    p, q = wanted.double().softmax(-1), given.double().softmax(-1)
    return (p * (p / q).log()).sum(-1)


def test_the_divergence_is_from_the_target_to_the_draft() -> None:
    p, q = torch.tensor([0.98, 0.01, 0.01]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.98 * math.log(0.98 / 0.25) + 0.01 * math.log(0.01 / 0.25) + 0.01 * math.log(0.01 / 0.5)
    assert divergence(p.log() + 3, q.log() - 1).item() == pytest.approx(expected, rel=1e-6)
    assert divergence(q.log(), p.log()).item() != pytest.approx(expected, rel=0.1)


def teacher_of(seed: int) -> Transformer:
    """A model of strong opinions."""
    model = new_model(UNTIED, seed).requires_grad_(False)
    model.lm_head.weight.mul_(50)
    return model


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_softens_both_by_the_temperature_and_scales_by_its_square(temperature: float) -> None:
    model, teacher = new_model(UNTIED, 0), teacher_of(2)
    rows = Windows(noise().training, CONTEXT, seed=0).rows(0, 4)
    wanted, given = (logits_of(each, rows[:, :-1]) / temperature for each in (teacher, model))
    expected = temperature**2 * kl(wanted, given).mean().item()
    assert expected > 0.1
    assert Distillation(model, teacher, temperature)(rows).item() == pytest.approx(expected, rel=1e-5)
    run = trainer(teacher=teacher, distill_temperature=temperature)
    run.advance(1)
    assert run.losses[0] == pytest.approx(expected, rel=1e-5)


def test_validation_against_a_teacher_is_the_plain_divergence_and_the_share_of_equal_choices() -> None:
    teacher = teacher_of(0)  # who begins with the same choices
    run = trainer(teacher=teacher, distill_temperature=4.0, learning_rate=5e-3)
    run.advance(4)
    tokens = noise().validation
    rows = torch.tensor([tokens[at : at + 17].tolist() for at in range(0, tokens.size - 16, 16)])
    wanted, given = (logits_of(each, rows[:, :-1]) for each in (teacher, run.model))
    found = run.validate()
    assert found.agreement and 0.02 < found.agreement < 0.98
    assert found.divergence == pytest.approx(kl(wanted, given).mean().item(), rel=1e-5)
    assert found.agreement == pytest.approx((wanted.argmax(-1) == given.argmax(-1)).double().mean().item())
    assert found.loss == pytest.approx(cross_entropy(run.model, rows).item(), rel=1e-6)


@pytest.mark.parametrize("windows", [(0, 0), (5, 0), (200, 1)])
def test_flops_count_every_product_and_every_key_that_a_token_sees_once(windows: tuple[int, int]) -> None:
    model = Transformer(ModelConfig(**(TINY | {"tie_embeddings": True, "windows": windows})))
    per_layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48
    keys = [sum(min(place, window or 100) for place in range(1, 101)) / 100 for window in windows]
    expected = 2 * (2 * per_layer + 258 * 32) + sum(2 * 2 * 32 * number for number in keys)
    assert forward_flops(model, 100) == pytest.approx(expected, abs=2)


def test_speed_and_utilization_leave_out_the_first_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 60.0, 62.0])
    monkeypatch.setattr("fastgen.training.run.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr("fastgen.training.run.measure_flop_rate", lambda device, dtype: 1e9)
    teacher = teacher_of(2)
    run = Run(trainer(teacher=teacher), SimpleNamespace(), noise(), CPU, None)  # type: ignore[arg-type]
    run.advance(2)
    assert run.tokens_per_second() is None and run.mfu() is None
    run.advance(8)
    speed = 6 * 4 * CONTEXT / 2.0
    assert run.tokens_per_second() == pytest.approx(speed) and run.seconds == pytest.approx(52)
    # Forward and backward of the model, forward of its teacher of the same shape.
    expected = speed * 4 * forward_flops(teacher, CONTEXT) / 1e9
    assert run.mfu() == pytest.approx(expected)
    run.trainer.ranks = Ranks(world=2)
    assert run.mfu() == pytest.approx(expected / 2), "two devices could do twice the arithmetic"


def test_other_tokens_or_another_division_have_another_fingerprint() -> None:
    tokens = np.arange(1000, dtype=np.uint16)
    whole = TokenData(tokens[:900], tokens[900:])
    changed, late = tokens.copy(), tokens.copy()
    changed[5] += 1
    late[905] += 1
    others = (
        TokenData(changed[:900], changed[900:]),
        TokenData(late[:900], late[900:]),
        TokenData(tokens[:899], tokens[899:]),
    )
    assert TokenData(tokens.copy()[:900], tokens.copy()[900:]).fingerprint() == whole.fingerprint()
    assert len({data.fingerprint() for data in (whole, *others)}) == 4
