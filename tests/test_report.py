"""Figures follow from the times that were taken and the bytes that a step must read, as the README defines them."""

import pytest

from fastgen import benchmark
from fastgen.completion import Completion
from fastgen.engine import Engine, Timings
from fastgen.report import Spread, aligned, compared, measure, spread
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from fastgen.steps import Steps
from tests.models import random_model


def completion(prompt: int, new: int) -> Completion:
    return Completion(tuple(range(prompt)), tuple(range(new)), "", "length")


def test_metrics_are_those_of_known_times_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.report.measure_read_bandwidth", lambda device: 0.002)
    engine = Engine(random_model(), batch=2)
    times = [10.75, 11.0, 11.5, 12.5, 99.0]
    engine.timings = Timings(start=10.0, prefilled=10.5, tokens=times, ends=[1, 2, 3, 4, 5])
    found = measure(engine, [completion(6, 4), completion(9, 2)], load_seconds=1.5, compile_seconds=0.0)
    # 2 layers of wqkv, wo, gate and up, down, two norms; the last norm, the head, and one row of the embedding.
    layer = 32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    weights = 4 * (2 * layer + 32 + 258 * 32 + 32)
    kv = 4 * 2 * 2 * 16 * (6 + 4 // 2 + 9 + 2 // 2)
    assert (found.weight_bytes, found.kv_bytes) == (weights, kv)
    assert (found.prompt_tokens, found.new_tokens) == (15, 6)
    assert found.prefill_tokens_per_second == pytest.approx(15 / 0.5)
    assert found.time_to_first_token_seconds == pytest.approx(0.75)
    assert found.ms_per_token == Spread(500.0, 250.0, 1000.0)
    assert found.decode_tokens_per_second == pytest.approx(4 / 1.75), "the first token of each row is prefill's"
    assert found.gb_per_second == pytest.approx((weights + kv) * 3 / 1.75 / 1e9)
    assert found.share_of_limit == pytest.approx(found.gb_per_second / 0.002)


def test_a_single_token_has_no_rates() -> None:
    engine = Engine(random_model())
    engine.timings = Timings(start=10.0, prefilled=10.5, tokens=[10.75], ends=[1])
    found = measure(engine, [completion(6, 1)], load_seconds=0.0, compile_seconds=0.0)
    assert found.decode_tokens_per_second is found.ms_per_token is found.share_of_limit is None
    assert found.read_limit_gb_per_second is None, "there is nothing to compare, and it takes time"


def test_a_round_takes_its_time_however_little_of_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.report.measure_read_bandwidth", lambda device: 0.002)
    engine, clock = Engine(random_model()), iter([10.75, 11.75, 13.75])
    engine.timings = Timings(start=10.0, prefilled=10.5)
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(clock))
        for steps in (1, 8, 8):
            engine.timings.share_out(steps)
    found = measure(engine, [completion(6, 12)], load_seconds=0.0, compile_seconds=0.0)
    assert found.decode_tokens_per_second == pytest.approx(11 / 3)
    assert found.gb_per_second == pytest.approx((found.weight_bytes + found.kv_bytes) * 16 / 3 / 1e9)
    assert found.ms_per_token == Spread(125.0, 125.0, 250.0)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_speed_up_is_plain_time_over_speculations(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row takes 0.1 s a token with drafts, and plain decoding 0.25 s."""
    monkeypatch.setattr("fastgen.report.measure_read_bandwidth", lambda device: 1.0)
    engine = SpeculativeEngine(random_model(), Speculation(count=3), batch=batch)
    engine.timings = Timings(start=0.0, prefilled=0.5, tokens=[1.0, 1.1, 1.2, 1.3], ends=[1, 4])
    found = measure(engine, [completion(6, 4)] * batch, load_seconds=0.0, compile_seconds=0.0)
    plain = Timings(start=0.0, prefilled=0.5, tokens=[3.0, 3.25, 3.5, 3.75, 9.0], ends=[1, 2, 3, 4, 5])
    for text, same in (((0, 1, 2, 3), True), ((0, 1, 2, 4), False)):
        speculation = compared(found, plain, text, (0, 1, 2, 3)).speculation
        assert speculation.plain_ms_per_token == pytest.approx(250.0) and speculation.same_text is same
        assert speculation.speedup == pytest.approx(2.5)


def test_a_spread_holds_the_median_and_the_tenth_parts_from_both_ends() -> None:
    assert spread([float(value) for value in range(100, 0, -1)]) == Spread(50.5, 11.0, 91.0)
    assert spread([3.0]) == Spread(3.0, 3.0, 3.0)


def test_every_timed_text_is_prefilled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    starts, prefill = [], Steps.prefill

    def counted(self: Steps, tokens: object, start: int, lengths: object) -> object:
        starts.append(start)
        return prefill(self, tokens, start, lengths)

    monkeypatch.setattr(Steps, "prefill", counted)
    timing = benchmark.time_engine(
        random_model(), compile=False, batch=1, prompt_tokens=20, new_tokens=4, repeats=2
    )  # fmt: skip
    assert starts == [0, 16] * 3
    assert len(timing.steps) == 2 * 3, "the text that warms up is not timed"


def test_columns_are_aligned_to_the_side_that_was_asked_for() -> None:
    assert aligned([["a", "b"], ["cc", "ddd"]], left=1) == "a     b\ncc  ddd"
