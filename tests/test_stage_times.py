"""The table of a step's stages: what each must read is counted right, and every width is timed."""

import pytest

from fastgen.stage_times import WIDTHS, table, time_stages, time_steps
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


def test_steps_of_every_width_stand_under_the_table() -> None:
    model = random_model(n_layers=1)
    steps = time_steps(model, filled=5)
    assert tuple(steps) == WIDTHS
    text = table("tiny", time_stages(model, filled=5, tokens=1, limit=10.0, peers=False), steps)
    assert "norm_swiglu" in text
    assert text.endswith(f"16: {steps[16]:.0f} us ({steps[16] / steps[1]:.2f}x)")
