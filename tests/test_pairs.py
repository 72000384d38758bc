"""Synthetic pairs agree as often as they are damped to, whatever the format of the target's weights."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastgen.kernels.packed import PackedLinear
from fastgen.options import GenerationOptions
from fastgen.pairs import damp, first_layers
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from quantize.int4 import Int4Linear
from scripts import bench_speculation
from tests.models import random_model
from tests.sharded import CASES, whole


def test_the_more_a_target_is_damped_the_more_its_first_layers_agree_with_it() -> None:
    target = random_model(n_layers=4)
    options = GenerationOptions(max_new_tokens=60, ignore_eos=True)
    found = []
    for factor in (1.0, 0.02, 1e-6):
        damp(target, layers=2, factor=factor)
        engine = SpeculativeEngine(target, Speculation(draft=first_layers(target, 2), count=3), max_seq_len=96)
        engine.generate([[1, 2, 3]], options)
        found.append(engine.tally.acceptance)
    assert found[0] < 0.5 < found[1] <= found[2] == 1


@pytest.mark.parametrize("quant", ["int8", "int4 g32"])
def test_damping_quantized_weights_scales_them(quant: str) -> None:
    target = whole(CASES[quant])
    linear = target.transformer.layers[1].w_down
    before = linear.weight_scale.clone()
    damp(target, layers=1, factor=0.25)
    assert linear.weight_scale.equal(before * 0.25)
    assert isinstance(linear, Int4Linear) == (quant == "int4 g32")


@pytest.mark.parametrize(("words", "tail", "factors"), [(512, (8,), 16), (256, (3, 8), 16), (256, (3, 20), 32)])
def test_scales_in_the_kernels_layout_are_damped_as_numbers_and_nothing_else_is(
    words: int, tail: tuple[int, ...], factors: int
) -> None:
    target = random_model(dtype="bf16")
    content = torch.randint(1 << 30, (2, 3, words), dtype=torch.int32)
    scales = torch.randint(1 << 30, (2, *tail), dtype=torch.int32)
    scales.view(torch.bfloat16)[..., :factors] = torch.arange(1.0, factors + 1).bfloat16()
    for block in target.transformer.layers:
        for name in ("wo", "w_down"):
            tensors = content.clone(), scales.clone(), None
            block.set_submodule(name, PackedLinear(*tensors, out_features=32, in_features=384, dtype=torch.bfloat16))
    damp(target, layers=1, factor=0.5)
    first, second = (block.wo for block in target.transformer.layers)
    assert first.words.equal(content) and first.scales.equal(scales) and second.words.equal(content)
    halved = torch.arange(1.0, factors + 1).bfloat16() * 0.5
    assert second.scales.view(torch.bfloat16)[..., :factors].eq(halved).all()
    assert second.scales[..., factors // 2 :].equal(scales[..., factors // 2 :])


def test_the_benchmark_finds_an_agreement_and_writes_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, output = random_model(n_layers=4), tmp_path / "rows.json"
    monkeypatch.setattr(bench_speculation, "load", lambda config: (target, first_layers(target, 2)))
    flags = ["--no-compile", "--new-tokens", "60", "--prompt", "abc"]
    flags += ["--cases", "a0.8", "100", "ngram@1", "--speculate", "4", "auto", "--repeats", "1"]
    assert bench_speculation.main([*flags, "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["records"]
    assert [(row["draft"], row["drafts"]) for row in rows[::2]] == [("first 2 layers", 4)] * 2 + [("ngram", 4)]
    assert all(row["same"] for row in rows)
    assert abs(rows[0]["agreement"] - 0.8) <= bench_speculation.CLOSE and rows[0]["wanted"] == 0.8
    assert rows[2]["agreement"] < 0.2 and rows[4]["agreement"] < 0.2


def test_the_benchmark_begins_no_row_that_would_end_too_late() -> None:
    def rows() -> Iterator[dict[str, object]]:
        for number in range(9):
            clock[0] += 10.0
            yield {"number": number}

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock[0])
        assert len(list(bench_speculation.within(45.0, rows()))) == 4
