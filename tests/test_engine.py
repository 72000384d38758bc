"""The engine gives what its naive twin gives, whatever the chunks, the batch and the options."""

import itertools
from collections.abc import Callable

import pytest
import torch

from fastgen.config import RopeScaling
from fastgen.engine import Engine
from fastgen.errors import CapacityError, ModelFileError, UsageError
from fastgen.graphs import Burst
from fastgen.naive import generate_naively
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.steps import CHUNKS, Choice, chunks
from tests.models import random_model

FAMILIES = {
    "llama": {},
    "mha": {"n_kv_heads": 4},
    "mqa-tied": {"n_kv_heads": 1, "tie_embeddings": True},
    "biases-window": {"qkv_bias": True, "output_bias": True, "mlp_bias": True, "windows": (5, 0)},
    "qk-norm-wide-heads": {"qk_norm": True, "head_dim": 16},
}


def text_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
def test_greedy_tokens_equal_the_naive_twins(family: str, length: int) -> None:
    model = random_model(**FAMILIES[family])
    prompt, options = text_of(length), GenerationOptions(max_new_tokens=24, ignore_eos=True)
    expected = generate_naively(model, prompt, 24, options.sampling)
    assert list(Engine(model).generate([prompt], options)[0].tokens) == expected
    assert len(set(expected)) > 3, "a text of one repeated token would prove little"


@pytest.mark.parametrize(
    ("count", "expected"), [(1, []), (2, [1]), (4, [1, 1, 1]), (5, [4]), (9, [4, 4]), (12, [4, 4, 1, 1, 1])]
)
def test_a_text_of_so_many_tokens_is_made_of_bursts_and_at_its_end_of_single_steps(
    count: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with several steps of a CPU in the place of a graph."""
    model, made = random_model(), []
    engine, options = Engine(model), GenerationOptions(max_new_tokens=count, ignore_eos=True)
    decode = engine._steps.decode

    def several(filled: int, sampling: SamplingOptions, *, logprobs: bool, left: int) -> Choice:
        made.append(Burst(4, 1).steps(left))
        choices = [decode(filled + step, sampling, logprobs=logprobs, left=1) for step in range(made[-1])]
        return Choice(torch.cat([choice.token for choice in choices]), None)

    monkeypatch.setattr(engine._steps, "decode", several)
    tokens = list(engine.generate([text_of(17)], options)[0].tokens)
    assert tokens == generate_naively(model, text_of(17), count, options.sampling) and made == expected


def test_a_text_that_its_context_ends_is_no_longer_made_of_bursts_either(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, asked = Engine(random_model(), batch=2, max_seq_len=24), []
    decode = engine._steps.decode

    def noting(filled: int, sampling: SamplingOptions, *, logprobs: bool, left: int) -> Choice:
        asked.append(left)
        return decode(filled, sampling, logprobs=logprobs, left=left)

    monkeypatch.setattr(engine._steps, "decode", noting)
    engine.generate([text_of(17), text_of(20)], GenerationOptions(max_new_tokens=100, ignore_eos=True))
    assert asked == [6, 5, 4, 3, 2, 1], "the shorter prompt has room for seven tokens, the first of which is there"


def test_a_warm_up_makes_bursts_and_single_steps_up_to_every_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made, started = Engine(random_model(), max_seq_len=240), [], []
    steps = engine._steps
    steps.burst = Burst(8, 1)
    monkeypatch.setattr(steps, "bounds", lambda: [100, 200])
    monkeypatch.setattr(steps, "start", lambda rows: started.append(int(rows.positions[0])))
    monkeypatch.setattr(steps, "decode", lambda filled, options, *, logprobs, left: made.append((filled, left)))
    with torch.inference_mode():
        for job in engine._warm_jobs(GenerationOptions()):
            job()
    ends = [(filled + steps.burst.steps(left) - 1, steps.burst.steps(left)) for filled, left in made]
    assert ends == [(100, 1), (100, 8), (200, 1), (200, 8)], "where the last step attends to, and how many there are"
    assert started == [filled - 1 for filled, _ in made], "the row's token stands where the first step appends it"


def test_sampled_tokens_equal_the_naive_twins_with_every_filter() -> None:
    model, prompt = random_model(), text_of(20)
    sampling = SamplingOptions(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    expected = generate_naively(model, prompt, 30, sampling)
    options = GenerationOptions(max_new_tokens=30, ignore_eos=True, sampling=sampling)
    assert list(Engine(model).generate([prompt], options)[0].tokens) == expected


def test_sampled_texts_repeat_by_seed_and_differ_by_seed_and_sample() -> None:
    engine = Engine(random_model(), batch=2)
    prompt = text_of(9)

    def texts(seed: int) -> list[tuple[int, ...]]:
        sampling = SamplingOptions(temperature=1.0, seed=seed)
        options = GenerationOptions(max_new_tokens=20, ignore_eos=True, sampling=sampling)
        return [row.tokens for row in engine.generate([prompt, prompt], options)]

    assert texts(1) == texts(1)
    assert len({*texts(1), *texts(2)}) == 4


def test_rows_of_a_batch_equal_single_runs() -> None:
    model = random_model()
    prompts = [text_of(3, 1), text_of(40, 2), text_of(17, 3)]
    options = GenerationOptions(max_new_tokens=20, ignore_eos=True)
    alone = [Engine(model).generate([prompt], options)[0].tokens for prompt in prompts]
    assert [row.tokens for row in Engine(model, batch=3).generate(prompts, options)] == alone


def test_rows_reuse_the_cache_no_further_than_all_of_them_can() -> None:
    engine, options = Engine(random_model(), batch=2), GenerationOptions(max_new_tokens=9, ignore_eos=True)
    first = engine.generate([text_of(40, 1), text_of(30, 2)], options)
    going_on = [*first[0].prompt_tokens, *first[0].tokens, 7, 8]
    parting = [*first[1].prompt_tokens[:20], 1, 2, 3]
    second = engine.generate([going_on, parting], options)
    assert engine.timings.prefilled_tokens == len(going_on) - 20
    twin = random_model()
    for row, prompt in zip(second, (going_on, parting), strict=True):
        assert list(row.tokens) == generate_naively(twin, prompt, 9, options.sampling)


def test_keys_that_dynamic_rope_turned_by_another_length_are_not_reused() -> None:
    scaling = RopeScaling(kind="dynamic", factor=2.0, original_max_seq_len=16)
    model, options = random_model(rope_scaling=scaling), GenerationOptions(max_new_tokens=8, ignore_eos=True)
    prompt = text_of(40)
    fresh = Engine(model).generate([prompt], options)
    engine = Engine(model)
    engine.generate([prompt[:20]], options)
    assert engine.generate([prompt], options) == fresh
    assert engine.timings.prefilled_tokens == 40


def test_log_probabilities_are_the_models_own_before_penalty_temperature_and_filters() -> None:
    model, prompt = random_model(), text_of(12)
    sampling = SamplingOptions(temperature=1.5, top_k=20, top_p=0.8, repetition_penalty=1.3, seed=4)
    options = GenerationOptions(max_new_tokens=10, ignore_eos=True, logprobs=True, sampling=sampling)
    row = Engine(model).generate([prompt], options)[0]
    text = torch.tensor([[*prompt, *row.tokens]])
    positions = torch.arange(text.shape[1])
    model.transformer.allocate_cache(1, text.shape[1])
    hidden = model.transformer(text, positions[None], positions, torch.tensor([text.shape[1]]))
    expected = model.transformer.logits(hidden)[0, 11:-1].log_softmax(-1)[torch.arange(10), text[0, 12:]]
    assert row.logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_an_engine_forgets_its_last_text() -> None:
    model, options = random_model(), GenerationOptions(max_new_tokens=10, ignore_eos=True)
    engine = Engine(model)
    first = engine.generate([text_of(12)], options)
    engine.generate([text_of(90, 7)], options)
    assert engine.generate([text_of(12)], options) == first


@pytest.mark.parametrize("length", [1, 16, 17, 127, 128, 700, 1023, 1024, 2500])
def test_chunks_cover_a_prompt_without_gap(length: int) -> None:
    position = 0
    for start, width in chunks(0, length):
        assert start == position and width in CHUNKS
        position += width
    assert length <= position < length + CHUNKS[-1]


def test_a_text_ends_at_an_end_token_and_keeps_it_out_of_the_text() -> None:
    model = random_model()
    prompt = text_of(5)
    plain = Engine(model).generate([prompt], GenerationOptions(max_new_tokens=40, ignore_eos=True))[0]
    ending = plain.tokens[6]
    model.tokenizer.stop_ids = frozenset({ending})
    ended = Engine(model).generate([prompt], GenerationOptions(max_new_tokens=40))[0]
    at = plain.tokens.index(ending)
    assert ended.tokens == plain.tokens[: at + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == model.tokenizer.decode(plain.tokens[:at])


def test_a_full_context_ends_a_text() -> None:
    model = random_model(max_seq_len=64)
    row = Engine(model).generate([text_of(50)], GenerationOptions(max_new_tokens=100, ignore_eos=True))[0]
    assert len(row.tokens) == 14
    assert row.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([list(range(64))], "64 tokens.*64"),
        ([[]], "empty"),
        ([[300]], "token 300"),
        ([[1], [2]], "2 prompts"),
        ("hi", "a text for an engine"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(prompts: list[list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine(random_model(max_seq_len=64)).generate(prompts)


def test_a_stream_refuses_bad_prompts_at_the_call() -> None:
    engine = Engine(random_model(max_seq_len=64), batch=2)
    with pytest.raises(UsageError, match="token 300"):
        engine.stream([[1], [300]])
    with pytest.raises(UsageError, match="1 sample numbers for 2 prompts"):
        engine.stream([[1], [2]], samples=[7])


def test_a_context_beyond_the_models_is_refused() -> None:
    with pytest.raises(UsageError, match=r"1000.*256"):
        Engine(random_model(), max_seq_len=1000)


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = random_model()
    model.transformer.norm.weight[3] = float("nan")
    with pytest.raises(ModelFileError, match="not finite at position 4"):
        Engine(model).generate([[1, 2, 3, 4]])


def test_a_text_that_is_not_finite_leaves_nothing_to_the_next() -> None:
    model, options = random_model(), GenerationOptions(max_new_tokens=30, ignore_eos=True)
    expected = Engine(model, max_seq_len=64).generate([text_of(5, 2)], options)
    engine, weight = Engine(model, max_seq_len=64), model.transformer.embedding.weight
    poison, kept = text_of(40, 3), weight.clone()
    weight[poison[25:]] = float("inf")
    with pytest.raises(ModelFileError, match="not finite"):
        engine.generate([poison], options)
    weight.copy_(kept)
    assert engine.generate([text_of(5, 2)], options) == expected


def test_engines_that_share_a_model_never_read_each_others_cache() -> None:
    model, options = random_model(), GenerationOptions(max_new_tokens=12, ignore_eos=True)
    first, second = Engine(model), Engine(model, batch=2)
    prompt, other = text_of(40), text_of(40, 9)
    expected = generate_naively(model, prompt, 12, options.sampling)
    for _ in range(2):
        assert list(first.generate([prompt], options)[0].tokens) == expected
        assert list(second.generate([other, prompt], options)[1].tokens) == expected


def test_what_was_captured_for_a_cache_that_is_gone_is_captured_before_the_next_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, options, warmed = random_model(), GenerationOptions(max_new_tokens=2), []
    first, second = Engine(model), Engine(model)
    monkeypatch.setattr(Engine, "compiled", property(lambda engine: True))
    monkeypatch.setattr(Engine, "_captures", lambda engine: 1)
    monkeypatch.setattr(Engine, "_warm_jobs", lambda engine, options: [lambda: warmed.append((engine, options))])
    first.warm_up(options)
    for engine in (first, first, second, second):
        engine.generate([text_of(5)], options)
    assert warmed == [(first, options)], "once, and nothing of an engine that was never warm"
    first.generate([text_of(5)], options)
    assert warmed == [(first, options)] * 2


def test_an_interrupted_warm_up_leaves_nothing_for_a_text_to_reuse(monkeypatch: pytest.MonkeyPatch) -> None:
    options = GenerationOptions(max_new_tokens=12, ignore_eos=True)
    engine, prompt = Engine(random_model()), text_of(40)
    expected = engine.generate([prompt], options)[0].tokens

    def jobs(options: GenerationOptions) -> list[Callable[[], None]]:
        def stop() -> None:
            raise KeyboardInterrupt

        return [*Engine._warm_jobs(engine, options), stop]

    monkeypatch.setattr(Engine, "compiled", property(lambda engine: True))
    monkeypatch.setattr(engine, "_warm_jobs", jobs)
    with pytest.raises(KeyboardInterrupt):
        engine.warm_up(options)
    assert engine.generate([prompt], options)[0].tokens == expected


def test_what_a_warm_up_calls_fits_into_the_smallest_context() -> None:
    engine = Engine(random_model(), max_seq_len=2)
    for job in engine._warm_jobs(GenerationOptions()):
        job()


def test_a_text_whose_cache_was_warmed_up_does_not_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(random_model())
    stale = engine.stream([text_of(5)], GenerationOptions(max_new_tokens=50, ignore_eos=True))
    next(stale)
    monkeypatch.setattr(Engine, "compiled", property(lambda engine: True))
    engine.warm_up()
    with pytest.raises(UsageError, match="cannot go on"):
        list(stale)


def test_a_cache_that_was_allocated_in_part_belongs_to_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = random_model(), GenerationOptions(max_new_tokens=12, ignore_eos=True)
    large, prompt = Engine(model), text_of(100)
    expected = large.generate([prompt], options)[0].tokens
    Engine(model, max_seq_len=32)
    zeros, calls = torch.zeros, itertools.count()

    def too_large(*arguments: object, **more: object) -> torch.Tensor:
        if next(calls) == 1:
            raise torch.OutOfMemoryError
        return zeros(*arguments, **more)

    monkeypatch.setattr(torch, "zeros", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        large.generate([prompt], options)
    assert large.generate([prompt], options)[0].tokens == expected


def test_a_text_whose_cache_was_taken_over_does_not_go_on() -> None:
    engine = Engine(random_model())
    stale = engine.stream([text_of(5)], GenerationOptions(max_new_tokens=50, ignore_eos=True))
    next(stale)
    engine.generate([text_of(9)], GenerationOptions(max_new_tokens=3))
    with pytest.raises(UsageError, match="cannot go on"):
        list(stale)


def test_an_engine_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="batch 0"):
        Engine(random_model(), batch=0)


def test_a_cache_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    monkeypatch.setattr("fastgen.device.free_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"a KV cache of 1 x 256 tokens needs .* GB on cpu, 0\.0 GB are free"):
        Engine(model)


def test_a_model_that_does_not_fit_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.device.free_memory", lambda device: 1000)
    with pytest.raises(CapacityError, match=r"the model needs [^\n]*\n.*--quant int4"):
        random_model()
