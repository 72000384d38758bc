"""`fastgen.bench`: several shapes in one process, each in a format of its own, and none in the memory of the next."""

import functools
import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import bench, load, shapes, stage_times
from fastgen.device import choose_placement
from fastgen.errors import UsageError
from quantize.scheme import Scheme

QUICK = ("--device", "cpu", "--modes", "eager", "--new-tokens", "3", "--repeats", "1")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape of that name."""
    monkeypatch.setitem(shapes.SHAPES, "small", replace(shapes.SHAPES["stories15m"], n_layers=1, windows=(0,)))


def measured(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """The records that a run writes."""
    output = folder / "records.json"
    assert bench.main([*QUICK, *flags, "--output", str(output)]) == 0
    return json.loads(output.read_text())["records"]


@pytest.mark.usefixtures("small")
def test_every_shape_has_its_own_format_and_the_memory_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, random_model, left = [], load.random_model, []

    def remembered(*arguments: Any, **options: Any) -> load.LoadedModel:
        left.append(sum(model() is not None for model in made))
        model = random_model(*arguments, **options)
        model.transformer.cycle = [model.transformer]  # as CUDA graphs and what they capture
        made.append(weakref.ref(model.transformer))
        return model

    monkeypatch.setattr(load, "random_model", remembered)
    gc.disable()  # as if nobody else ever collected
    try:
        flags = [word for name in ("small", "small:int8", "small:int4") for word in ("--shape", name)]
        records = measured(tmp_path, *flags, "--quant", "int4")
    finally:
        gc.enable()
    assert left == [0, 0, 0]
    assert [record["format"].split(",")[0] for record in records] == ["int4-g32-asym", "int8", "int4-g32-asym"]
    assert {record["model"] for record in records} == {"small"}
    assert all(record["all_reduce_us"] is None for record in records)


@pytest.mark.usefixtures("small")
def test_stages_of_every_shape_stand_beside_pytorchs_where_its_weights_are_plain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr(stage_times, "_clocked", lambda function: (function(), 1e-6)[1])
    packed, plain = measured(tmp_path, "--shape", "small:int8", "--shape", "small", "--stages", "--dtype", "fp32")
    assert (packed["format"], plain["format"]) == ("int8", "fp32")
    for record in (packed, plain):
        assert record["filled"] == 5 + 3 // 2
        assert list(record["step_us"]) == ["1", "2", "4", "8", "16"]
        assert [stage["tokens"] for stage in record["stages"]] == [1] * 6 + [8] * 6 + [16] * 6
    assert "stages_beside_pytorch" not in packed
    assert all(stage["compiled_us"] > 0 for stage in plain["stages_beside_pytorch"])


@pytest.mark.parametrize("flags", [[], ["--stages"]])
def test_no_model_begins_behind_the_limit(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = ["--shape", "stories15m", "--shape", "stories15m:int8"]
    output = tmp_path / "records.json"
    assert bench.main([*QUICK, *shapes, *flags, "--limit", "0", "--output", str(output)]) == 0
    assert not output.exists() and "stories15m" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--stages"]])
def test_flags_that_one_of_the_shapes_refuses_end_it_before_anything_is_measured(
    flags: list[str], tmp_path: Path
) -> None:
    shapes = ["--shape", "stories15m:int4", "--shape", "stories15m:int8"]
    with pytest.raises(UsageError, match="only int4 has groups"):
        bench.main([*QUICK, *shapes, *flags, "--group-size", "32", "--output", str(tmp_path / "records.json")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", ["stories15m:int5", "stories15m:", "nothing:int4"])
def test_a_shape_or_a_format_that_is_not_known_ends_it_before_anything_is_measured(shape: str) -> None:
    with pytest.raises(UsageError, match="expected one of"):
        bench.main([*QUICK, "--shape", "stories15m", "--shape", shape])


def test_random_weights_are_let_go_once_they_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref[Tensor]] = []
    quantize = load.quantize_weight

    def watched(name: str, weight: Tensor, *rest: Any) -> Any:
        assert sum(ref() is not None for ref in seen) <= 1, "at most the one before is still there"
        seen.append(weakref.ref(weight))
        return quantize(name, weight, *rest)

    monkeypatch.setattr(load, "quantize_weight", watched)
    load.random_model(shapes.shape("stories15m"), choose_placement("cpu", "fp32"), scheme=Scheme(quant="int8"))
    assert len(seen) == 6 * 4 + 1
