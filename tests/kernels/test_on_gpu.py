"""`quantize.on_gpu`: a model's linears are packed one after another."""

import gc
import weakref

import pytest
import torch
from torch import nn

from quantize import int4, int8, on_gpu
from quantize.int4 import Int4Linear
from quantize.int8 import Int8Linear


def make(number: int) -> nn.Module:
    """A linear of one of the two formats."""
    weight = torch.randn(32, 64)
    if number % 2:
        return Int8Linear(*int8.quantize(weight, torch.bfloat16))
    q, scale, zero_point = int4.quantize(weight, 32, symmetric=False, scale_dtype=torch.bfloat16)
    return Int4Linear(int4.pack(q), scale, zero_point)


def test_each_linear_is_freed_when_it_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(make(number) for number in range(4)), nn.Linear(64, 32))
    references, alive = [weakref.ref(module) for module in list(model)[:4]], []

    def pack(*tensors: torch.Tensor | None) -> nn.Module:
        gc.collect()
        alive.append(sum(reference() is not None for reference in references))
        return nn.Identity()

    monkeypatch.setattr(on_gpu, "pack_int4", pack)
    monkeypatch.setattr(on_gpu, "pack_int8", pack)
    on_gpu.pack_linears(model)
    assert alive == [4, 3, 2, 1]
    assert [type(module) for module in model] == [nn.Identity] * 4 + [nn.Linear]
