"""A text read in steps is the text that scoring reads, fp32 is the same weights, and small errors are seen."""

import functools
import math

import pytest
import torch
from torch import nn

from fastgen.fidelity import Reading, choices, distance, perplexity_change, read, widened
from fastgen.kernels import reference
from fastgen.load import use_kernels
from fastgen.scoring import score
from quantize import int4, int8
from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear
from quantize.linear import make_linear, quantize_weight
from quantize.scheme import Scheme
from tests.models import random_model

TOKENS = [(7 * at * at + 3) % 251 for at in range(75)]


@pytest.mark.parametrize("chunk", [1, 16])
def test_steps_of_any_width_score_a_text_as_whole_windows_do(chunk: int) -> None:
    model = random_model()
    found = read(model, TOKENS, chunk=chunk, width=30)  # neither windows nor steps come out even
    scored = score(model, TOKENS, width=30)
    assert found.perplexity == pytest.approx(scored.perplexity, rel=1e-5)
    assert (len(found.logits), len(found.losses), len(found.best)) == (30, scored.tokens, len(TOKENS))
    assert torch.equal(found.best[:30], found.logits.argmax(1))


def test_the_step_that_decodes_likes_the_same_tokens() -> None:
    model = random_model()
    assert torch.equal(choices(model, TOKENS, width=30), read(model, TOKENS, chunk=16, width=30).best)


def test_compiled_steps_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = random_model(n_layers=1)
    eager, compiled = (read(model, TOKENS[:40], chunk=16, width=40, compiled=each) for each in (False, True))
    assert distance(compiled.logits, eager.logits) < 1e-5


def test_a_widened_model_has_the_same_weights_in_fp32() -> None:
    narrow, wide = random_model(dtype="bf16"), widened(random_model(dtype="bf16"))
    exact = random_model()
    for parameter, rounded in zip(exact.transformer.parameters(), narrow.transformer.parameters(), strict=True):
        parameter.copy_(rounded)
    expected = read(exact, TOKENS, chunk=16, width=64)
    assert torch.equal(read(wide, TOKENS, chunk=16, width=64).logits, expected.logits)
    assert 1e-4 < distance(read(narrow, TOKENS, chunk=16, width=64).logits, expected.logits) < 0.1


@pytest.mark.parametrize("quant", ["int4", "int8"])
def test_a_widened_quantized_model_keeps_its_integers_and_scales(quant: str) -> None:
    model, exact = random_model(dtype="bf16", hidden_dim=64), random_model(hidden_dim=64)
    scheme = Scheme(quant=quant, group_size=32, symmetric=False) if quant == "int4" else Scheme(quant=quant)
    for name, weight_format in scheme.formats(model.config).items():
        weight = model.transformer.get_submodule(name).weight
        linear = make_linear(weight_format, quantize_weight(name, weight, weight_format), None, torch.bfloat16)
        model.transformer.set_submodule(name, linear)
    for name, module in exact.transformer.named_modules():
        narrow = model.transformer.get_submodule(name)
        if isinstance(narrow, Int4Linear):
            stored = (narrow.weight_packed, narrow.weight_scale, narrow.weight_zero_point)
            module.weight = nn.Parameter(int4.dequantize(*stored, torch.float32), requires_grad=False)
        elif isinstance(narrow, Int8Linear):
            wide = int8.dequantize(narrow.weight, narrow.weight_scale, torch.float32)
            module.weight = nn.Parameter(wide, requires_grad=False)
        elif isinstance(module, nn.RMSNorm | nn.Embedding):
            module.weight = nn.Parameter(narrow.weight.float(), requires_grad=False)
    found = read(widened(model), TOKENS, chunk=1, width=64)
    assert distance(found.logits, read(exact, TOKENS, chunk=1, width=64).logits) < 1e-5
    assert distance(read(model, TOKENS, chunk=1, width=64).logits, found.logits) > 1e-4


def test_a_stage_that_is_slightly_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = read(random_model(), TOKENS, chunk=16, width=64)
    linear_add = reference.linear_add
    monkeypatch.setattr(reference, "linear_add", lambda x, linear, residual: 1.001 * linear_add(x, linear, residual))
    off = read(random_model(), TOKENS, chunk=16, width=64)
    assert 1e-5 < distance(off.logits, exact.logits) < 1e-2
    change, error = perplexity_change(exact, off)
    assert change != 0
    assert error < 0.05


def test_a_change_of_perplexity_is_that_of_the_same_tokens() -> None:
    losses, nothing = torch.tensor([1.0, 5.0, 3.0, 0.5]), torch.empty(0)
    before, after = (Reading(nothing, each, nothing) for each in (losses, losses + torch.tensor([0.1, 0.3, 0.1, 0.3])))
    change, error = perplexity_change(before, after)
    assert change == pytest.approx(after.perplexity / before.perplexity - 1) == pytest.approx(math.expm1(0.2))
    assert error == pytest.approx(0.2 / math.sqrt(3) / 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu_read_a_text_alike_in_steps_of_any_width() -> None:
    sizes = {"dim": 64, "head_dim": 16, "hidden_dim": 128}
    plain, ours = (random_model(device="cuda", dtype="bf16", **sizes) for _ in range(2))
    use_kernels(ours, "fused", compile=True)
    among, alone = (read(ours, TOKENS, chunk=chunk, width=64) for chunk in (16, 1))
    assert torch.equal(among.logits, alone.logits)
    assert torch.equal(choices(ours, TOKENS, width=64), among.best)
    exact, compiled = (
        read(model, TOKENS, chunk=16, width=64, compiled=each)
        for model, each in ((widened(plain), False), (plain, True))
    )
    assert distance(among.logits, exact.logits) <= 2 * distance(compiled.logits, exact.logits)
