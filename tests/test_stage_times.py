"""The table of a step's stages: what each must read is counted right, and every width is timed."""

import ctypes
import functools
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from fastgen import stage_times
from fastgen.load import use_kernels
from fastgen.stage_times import WIDTHS, steps_line, time_stages, time_steps
from fastgen.step_trace import PROGRAMMATIC, Kernel, describe, edge_types, trace_step
from tests.models import random_model


def test_stages_together_read_every_linear_once_and_the_cache() -> None:
    model = random_model(n_layers=3, tie_embeddings=False)
    rows = {row.stage: row for row in time_stages(model, filled=10, tokens=2, limit=10.0, peers=False)}
    linears = [
        module.weight
        for name, module in model.transformer.named_modules()
        if name.rsplit(".", 1)[-1] in ("wqkv", "wo", "w_gate_up", "w_down", "lm_head")
    ]
    attend = rows.pop("attend")
    assert attend.calls * attend.bytes == model.transformer.kv_bytes(10)
    assert sum(row.calls * row.bytes for row in rows.values()) == sum(weight.nbytes for weight in linears)
    for row in (attend, *rows.values()):
        assert row.tokens == 2
        assert row.share_of_limit == pytest.approx(row.bytes / (row.us * 1e3) / 10.0)


def test_a_stage_costs_what_a_step_without_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that counts the calls of stages, each takes a microsecond, alone and in a step."""
    model, calls = random_model(n_layers=3), []

    def counted(name: str) -> object:
        stage = getattr(stage_times.reference, name)
        return lambda *arguments, **options: (calls.append(name), stage(*arguments, **options))[1]

    names = ("rotations", "embed", "norm_linear", "attend", "linear_add", "norm_swiglu", "head", "greedy_head")
    model.transformer.stages = stages = SimpleNamespace(**{name: counted(name) for name in names})

    def seconds(model: object, function: object) -> float:
        calls.clear()
        function()
        return len(calls) / 1e6

    monkeypatch.setattr(stage_times, "_seconds", seconds)
    rows = time_stages(model, filled=10, tokens=2, limit=10.0, peers=False)
    assert [row.us for row in rows] == pytest.approx([1.0] * 6)
    assert [row.us_in_step for row in rows] == pytest.approx([1.0] * 6)
    assert model.transformer.stages is stages


def test_steps_of_every_width_stand_in_a_line() -> None:
    steps = time_steps(random_model(n_layers=1), filled=5)
    assert tuple(steps) == WIDTHS
    assert steps_line(steps).endswith(f"16: {steps[16]:.0f} us ({steps[16] / steps[1]:.2f}x)")


def test_pytorchs_stages_are_compiled_once_for_every_model_in_its_own_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    before = counters["stats"]["unique_graphs"]
    for heads in (2, 4, 8):  # the second is beyond the eight graphs that PyTorch keeps of one function
        model = random_model(n_layers=2, n_heads=heads, n_kv_heads=heads, dim=16 * heads)
        rows = time_stages(model, filled=5, tokens=1, limit=10.0, peers=True)
        assert all(row.eager_us and row.compiled_us for row in rows)
    assert counters["stats"]["unique_graphs"] - before == 3 * len(rows)


def test_a_trace_counts_kernels_that_start_before_the_end_of_those_ahead() -> None:
    kernels = [Kernel("a", 10.0, 14.0), Kernel("b", 13.0, 20.0), Kernel("a", 21.0, 23.5), Kernel("c", 23.5, 24.0)]
    trace = describe(kernels)
    assert trace["kernels"] == [
        {"kernel": "b", "count": 1, "us": 7.0},
        {"kernel": "a", "count": 2, "us": 6.5},
        {"kernel": "c", "count": 1, "us": 0.5},
    ]
    assert (trace["count"], trace["span_us"], trace["idle_us"], trace["overlaps"]) == (4, 14.0, 1.0, 1)
    assert describe([])["count"] == 0


@pytest.mark.parametrize("status", [0, 999])
def test_the_driver_says_which_edges_are_programmatic(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    def query(graph: ctypes.c_void_p, start: object, end: object, data: object, count: object) -> int:
        assert graph.value == 1234
        if data is not None:
            assert len(start) == len(end) == len(data) == 2
            data[0][2], data[1][0] = PROGRAMMATIC, 9  # another port is no other type
        count._obj.value = 2
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuGraphGetEdges_v2=query))
    assert edge_types(1234) == (None if status else [1, 0])
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert edge_types(1234) is None, "a driver before CUDA 12.3"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_is_kernels_whose_edges_let_them_start_early() -> None:
    model = random_model(device="cuda", dtype="bf16", dim=64, head_dim=16, hidden_dim=128)
    use_kernels(model, "fused", compile=True)
    rows = time_stages(model, filled=20, tokens=1, limit=4000.0, peers=True)
    assert all(row.us > 0 and row.eager_us and row.compiled_us for row in rows)
    trace = trace_step(model, filled=20, tokens=1)
    assert trace["count"] > 0
    assert 0 < trace["span_us"] < 1e5
    if trace["count"] > 1 and torch.cuda.get_device_capability() >= (9, 0):
        assert trace["programmatic_edges"] > 0
