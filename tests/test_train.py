"""Training: it learns, its gradients are transformers', it resumes exactly, many processes train as one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastgen.checkpoint.hf_save import hf_config, hf_tensors
from fastgen.config import ModelConfig
from fastgen.device import Placement
from fastgen.errors import UsageError
from fastgen.kernels.causal import CausalStages
from fastgen.model import Transformer
from fastgen.training.objective import Distillation, NextToken, logits_of
from fastgen.training.shape import new_model, parse_shape
from fastgen.training.tokens import TokenData, split
from fastgen.training.trainer import Trainer, TrainingOptions
from tests.models import TINY, random_model

CPU = Placement(torch.device("cpu"), torch.float32, "tests")
SMALL = ModelConfig(**(TINY | {"max_seq_len": 32}))


def noise(size: int = 4000) -> TokenData:
    tokens = np.random.default_rng(1).integers(0, 258, size).astype(np.uint16)
    return split(tokens, 0.1, 16, "noise")


def options(**changes: Any) -> TrainingOptions:
    return TrainingOptions(**({"steps": 8, "batch_size": 4, "context": 16, "warmup": 2} | changes))


def trainer(config: ModelConfig = SMALL, data: TokenData | None = None, **changes: Any) -> Trainer:
    return Trainer(new_model(config, seed=0), data or noise(), options(**changes), CPU)


def as_transformers(ours: Transformer) -> Any:
    """The same model in transformers, with its own copy of the weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    content = hf_config(ours.config, torch.float32)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))
    parts = hf_tensors(ours.config, dict(ours.named_parameters()))
    weights = {name: part.detach().clone() for name, part in parts}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return theirs


FAMILIES = {
    "tied": {"tie_embeddings": True},
    "untied": {},
    "window": {"windows": (5, 5)},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True, "head_dim": 16},
}


def randomized(changes: dict[str, Any]) -> Transformer:
    """A trainable model with the large random weights of `tests.models`."""
    model = random_model(**changes).transformer
    model.stages = CausalStages(model.config.n_kv_heads)
    return model.requires_grad_(True)


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_loss_and_gradients_equal_transformers(changes: dict[str, Any]) -> None:
    ours = randomized(changes)
    theirs = as_transformers(ours)
    rows = torch.randint(258, (3, 21), generator=torch.Generator().manual_seed(2))
    loss = NextToken(ours)(rows)
    loss.backward()
    logits = theirs(rows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    found = dict(hf_tensors(ours.config, gradients))
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, parameter in theirs.named_parameters():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm(), name


@pytest.mark.parametrize("changes", FAMILIES.values(), ids=FAMILIES)
def test_training_computes_what_generation_does(changes: dict[str, Any]) -> None:
    tokens = torch.randint(258, (2, 20), generator=torch.Generator().manual_seed(3))
    cached = random_model(**changes).transformer
    cached.allocate_cache(2, 32)
    positions = torch.arange(20).expand(2, 20)
    expected = cached.logits(cached(tokens, positions, positions[0], torch.tensor([20, 20])))
    torch.testing.assert_close(logits_of(randomized(changes), tokens), expected, rtol=1e-4, atol=1e-4)


def test_two_layers_overfit_one_batch() -> None:
    tokens = np.random.default_rng(5).integers(0, 258, 17).astype(np.uint16)
    run = trainer(data=TokenData(tokens, tokens), steps=150, learning_rate=1e-2, batch_size=1)
    run.advance(150)
    assert run.losses[0] > 5 and run.losses[-1] < 0.1
    assert run.validate().loss < 0.1


def test_a_draft_comes_to_agree_with_its_target() -> None:
    target = new_model(SMALL, 2).requires_grad_(False)
    target.embedding.weight.mul_(30)
    run = Trainer(new_model(SMALL, 1), noise(), options(steps=100, learning_rate=1e-2), CPU, teacher=target)
    before = run.validate()
    run.advance(100)
    after = run.validate()
    assert before.divergence is not None and after.divergence is not None and before.agreement is not None
    assert after.divergence < 0.5 * before.divergence
    assert after.agreement is not None and after.agreement > before.agreement + 0.1
    assert all(parameter.grad is None for parameter in target.parameters())


def test_following_oneself_costs_nothing() -> None:
    model = randomized({})
    rows = torch.randint(258, (2, 9), generator=torch.Generator().manual_seed(2))
    loss = Distillation(model, model, temperature=2.0)(rows)
    assert loss.abs().item() < 1e-5


def test_the_same_seed_gives_the_same_losses_and_another_seed_others() -> None:
    runs = [trainer(seed=seed) for seed in (0, 0, 1)]
    for run in runs:
        run.advance(8)
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_a_resumed_run_gives_the_losses_of_an_uninterrupted_one() -> None:
    whole, first, second = trainer(), trainer(), trainer()
    whole.advance(8)
    first.advance(5)
    second.restore({name: tensor.clone() for name, tensor in first.state().items()}, first.losses)
    second.advance(8)
    assert second.losses == whole.losses
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, second.model.get_parameter(name)), name


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    plan = options(steps=100, warmup=10, learning_rate=1.0)
    rates = [plan.rate(step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and math.isclose(rates[100], 0.1)
    assert math.isclose(rates[55], 0.55)


def test_matrices_decay_and_norms_do_not() -> None:
    run = trainer(learning_rate=1e-3, weight_decay=0.5, clip=1e-12, steps=1, warmup=0)
    before = {name: parameter.detach().clone() for name, parameter in run.model.named_parameters()}
    for parameter in run.model.parameters():
        parameter.register_hook(torch.zeros_like)
    run.advance(1)
    for name, parameter in run.model.named_parameters():
        kept = 1.0 if "norm" in name else 1 - 1e-3 * 0.5
        torch.testing.assert_close(parameter.detach(), before[name] * kept, rtol=1e-6, atol=0)


def test_a_loss_that_is_not_finite_stops_at_its_step() -> None:
    run = trainer(steps=20)
    run.advance(3)
    with torch.no_grad():
        run.model.norm.weight[0] = math.nan
    with pytest.raises(UsageError, match=r"step 4: the loss is nan.*\nLower --learning-rate \(0.001\)"):
        run.advance(6)
    assert len(run.losses) == run.step == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "--steps 0"),
        ({"accumulate": 3}, "--accumulate 3: expected a divisor of --batch-size 4"),
        ({"learning_rate": math.nan}, "--learning-rate nan"),
        ({"learning_rate": 0}, "--learning-rate 0"),
        ({"clip": 0}, "--clip 0"),
        ({"context": 1}, "--context 1"),
        ({"seed": 2**63}, "--seed"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        options(**changes)


def test_fp16_is_refused() -> None:
    with pytest.raises(UsageError, match="--dtype fp16"):
        Trainer(new_model(SMALL, 0), noise(), options(), Placement(torch.device("cpu"), torch.float16, "tests"))


def test_bf16_keeps_the_weights_in_fp32_and_learns() -> None:
    run = Trainer(new_model(SMALL, 0), noise(), options(), Placement(torch.device("cpu"), torch.bfloat16, "tests"))
    exact = trainer()
    run.advance(4)
    exact.advance(4)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    torch.testing.assert_close(torch.tensor(run.losses), torch.tensor(exact.losses), rtol=0.02, atol=0)
    assert run.losses != exact.losses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim=64,layers=2", "n_heads is missing"),
        ("dim=64,layers=2,heads=4,colour=3", "'colour=3' is not one of dim"),
        ("dim=64,layers=two,heads=4", "'layers=two'"),
        ("dim=65,layers=2,heads=4", "not a multiple of 4 heads"),
        ("gpt-5", "--shape gpt-5"),
    ],
)
def test_shapes_that_make_no_model_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_shape(text, vocab_size=300, context=64)


def test_a_shape_fills_in_what_it_leaves_out() -> None:
    config = parse_shape("dim=64,layers=2,heads=4", vocab_size=300, context=64)
    assert (config.n_kv_heads, config.head_dim, config.hidden_dim, config.vocab_size) == (4, 16, 192, 300)
    assert config.tie_embeddings and config.max_seq_len == 64
    other = parse_shape("dim=64,layers=2,heads=4,kv_heads=2,head-dim=32,tied=0,vocab-size=999", vocab_size=3, context=8)
    assert (other.n_kv_heads, other.head_dim, other.vocab_size, other.tie_embeddings) == (2, 32, 999, False)
    assert parse_shape("stories15m", vocab_size=300, context=64).vocab_size == 300


def command(tmp_path: Path, *flags: str, ranks: int = 1) -> dict[str, Any]:
    """Run `fastgen.train` on a small text in processes of its own and return the document that it prints."""
    text = tmp_path / "text.txt"
    text.write_text("A little dog saw a big ball. The ball was red, and the dog was happy.\n" * 60)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [
            sys.executable, *launcher, "-m", "fastgen.train", "--text", str(text), "--train-tokenizer", "290",
            "--shape", "dim=32,layers=2,heads=4,kv-heads=2", "--context", "16", "--batch-size", "8", "--steps", "6",
            "--warmup", "2", "--device", "cpu", "--dtype", "fp32", "--json", *flags,
        ],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    alone = command(tmp_path, "--accumulate", "2", "--out", str(tmp_path / "alone"))
    both = command(tmp_path, "--accumulate", "2", "--out", str(tmp_path / "both"), ranks=2)
    assert both["processes"] == 2
    torch.testing.assert_close(torch.tensor(both["losses"]), torch.tensor(alone["losses"]), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(both["validations"][-1]["loss"], alone["validations"][-1]["loss"], rtol=1e-6, atol=0)
