"""Compiled speculation gives plain eager tokens, and compiles nothing after its start; on a GPU it is two graphs."""

import pytest
import torch

from fastgen import drafters, rounds
from fastgen.engine import Engine
from fastgen.load import LoadedModel, use_kernels
from fastgen.options import GenerationOptions, SamplingOptions
from fastgen.pace import PLAIN
from fastgen.speculation import Speculation
from fastgen.speculative import SpeculativeEngine
from fastgen.steps import count_compilations
from tests.models import random_model
from tests.test_engine import text_of

GREEDY = GenerationOptions(max_new_tokens=24, ignore_eos=True)
SAMPLING = SamplingOptions(temperature=0.9, repetition_penalty=1.1, seed=3)
SAMPLED = GenerationOptions(max_new_tokens=24, ignore_eos=True, logprobs=True, sampling=SAMPLING)
PROMPTS = [text_of(length, length) for length in (7, 300, 1, 130)]


def check(engine: SpeculativeEngine, options: GenerationOptions) -> None:
    """Warm up, generate texts of many lengths, and compare with plain decoding: eagerly on a CPU, else compiled too,
    whose rounding compiled speculation shares."""
    engine.warm_up(options)
    prompts = [PROMPTS[at : at + engine.batch] for at in range(0, len(PROMPTS), engine.batch)]
    found = [[row.tokens for row in engine.generate(group, options)] for group in prompts]
    assert engine.recompiles == 0
    plain = Engine(engine.model, batch=engine.batch)
    assert found == [[row.tokens for row in plain.generate(group, options)] for group in prompts]


def test_compiled_rounds_give_plain_tokens_and_nothing_recompiles() -> None:
    target, draft = random_model(max_seq_len=400), random_model(1, max_seq_len=400, n_layers=1)
    check(SpeculativeEngine(target, Speculation(draft=draft, count=3), compile=True), GREEDY)


def test_auto_compiles_all_that_it_may_choose_beforehand() -> None:
    check(SpeculativeEngine(random_model(max_seq_len=400), Speculation(draft="self:1"), compile=True), GREEDY)


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_where_stages_are_kernels_only_choices_compile(
    options: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with PyTorch's stages in the place of the kernels."""
    for module in (rounds, drafters):
        monkeypatch.setattr(module, "covered_by_kernels", lambda model, tokens: True)
    target, draft = random_model(max_seq_len=400), random_model(1, max_seq_len=400, n_layers=1)
    engine = SpeculativeEngine(target, Speculation(draft=draft, count=3), compile=True)
    target.transformer.by_region = draft.transformer.by_region = False  # which is for CPUs
    before = count_compilations()
    with torch.inference_mode():
        for arm in (*engine.arms, PLAIN):
            engine._warm_arm(arm, 1, 40, options)
    graphs = count_compilations() - before
    check(engine, options)
    assert graphs == (0 if options is GREEDY else 4), "two of the draft, one of the target, one of plain decoding"


@pytest.mark.long
def test_auto_compiles_all_that_sampling_needs_beforehand() -> None:
    target = random_model(max_seq_len=400)
    engine = SpeculativeEngine(target, Speculation(draft=random_model(max_seq_len=400)), compile=True)
    check(engine, SAMPLED)
    other = SamplingOptions(temperature=0.5, repetition_penalty=1.3, seed=9)
    engine.generate([PROMPTS[1]], GenerationOptions(max_new_tokens=60, logprobs=True, sampling=other))
    assert engine.recompiles == 0, "other numbers are no other graph"


@pytest.mark.long
def test_leviathans_rule_compiles_for_a_batch() -> None:
    target = random_model(max_seq_len=400)
    sampling = SamplingOptions(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3)
    options = GenerationOptions(max_new_tokens=24, ignore_eos=True, logprobs=True, sampling=sampling)
    speculation = Speculation(draft=random_model(max_seq_len=400), count=2, accept="leviathan")
    engine = SpeculativeEngine(target, speculation, batch=2, compile=True)
    engine.warm_up(options)
    eager = SpeculativeEngine(target, speculation, batch=2)
    for group in (PROMPTS[:2], PROMPTS[2:]):
        found = [row.tokens for row in engine.generate(group, options)]
        assert found == [row.tokens for row in eager.generate(group, options)]
    assert engine.recompiles == 0
    assert eager.tally.acceptance > 0.95, "a draft that is the target is refused by rounding alone"


@pytest.mark.gpu
@pytest.mark.parametrize("draft", ["model", "self:1", "ngram"])
@pytest.mark.parametrize("count", [3, "auto"])
def test_rounds_in_cuda_graphs_give_plain_tokens(draft: str, count: int | str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.graphs.SINGLE_BYTES", 0)  # single steps at the end of a text
    target = random_model(device="cuda", max_seq_len=400)
    drafter = random_model(1, device="cuda", max_seq_len=400, n_layers=1) if draft == "model" else draft
    engine = SpeculativeEngine(target, Speculation(draft=drafter, count=count), compile=True)
    check(engine, SAMPLED)


SHAPE = {"dim": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "hidden_dim": 512, "n_layers": 3}


def kernel_models(kernels: str) -> tuple[LoadedModel, LoadedModel]:
    """A target and a draft in bf16 on a GPU."""
    target, draft = (random_model(seed, device="cuda", dtype="bf16", max_seq_len=400, **SHAPE) for seed in (0, 1))
    for model in (target, draft):
        use_kernels(model, kernels, compile=True)
    return target, draft


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_the_host_waits_for_nothing_while_it_queues_rounds(kernels: str) -> None:
    target, draft = kernel_models(kernels)
    engine = SpeculativeEngine(target, Speculation(draft=draft, count=3), compile=True)
    engine.warm_up(GREEDY)
    engine.generate([PROMPTS[0]], GREEDY)
    with torch.inference_mode():
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(8):
                engine._launch(engine.arms[0], 60, 1, GREEDY)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_fused_kernels_verify_what_they_decode_bit_for_bit() -> None:
    """In bf16, with kernels whose sums have one order for 1 to 16 tokens: no token differs, at any width."""
    target, draft = kernel_models("fused")
    plain = Engine(target, max_seq_len=400, compile=True)
    plain.warm_up(GREEDY)
    expected = [plain.generate([prompt], GREEDY)[0].tokens for prompt in PROMPTS]
    for drafter in (draft, "self:2", "ngram"):
        for count in (1, 3, 7, 15):
            engine = SpeculativeEngine(target, Speculation(draft=drafter, count=count), max_seq_len=400, compile=True)
            engine.warm_up(GREEDY)
            assert [engine.generate([prompt], GREEDY)[0].tokens for prompt in PROMPTS] == expected, (drafter, count)
            assert engine.recompiles == 0, (drafter, count)


@pytest.mark.gpu
def test_engines_that_take_turns_capture_nothing_within_a_text() -> None:
    target, draft = kernel_models("fused")
    plain = Engine(target, max_seq_len=400, compile=True)
    speculative = SpeculativeEngine(target, Speculation(draft=draft, count="auto"), max_seq_len=400, compile=True)
    for engine in (plain, speculative):
        engine.warm_up(GREEDY)
    found = [engine.generate([PROMPTS[0]], GREEDY)[0].tokens for engine in (plain, speculative, plain, speculative)]
    assert found == found[:1] * 4
    assert plain.recompiles == speculative.recompiles == 0


@pytest.mark.gpu
def test_a_text_that_was_left_in_the_middle_hinders_no_other_engine() -> None:
    target, draft = kernel_models("fused")
    plain = Engine(target, max_seq_len=400, compile=True)
    speculative = SpeculativeEngine(target, Speculation(draft=draft, count=3), max_seq_len=400, compile=True)
    held, found = [], []
    for engine in (plain, speculative, plain, speculative):
        text = engine.tokens(engine.encode([PROMPTS[0]]), GREEDY, samples=[0])
        held.append((text, [next(text) for _ in range(20)]))
        found.append(engine.generate([PROMPTS[0]], GREEDY)[0].tokens)
    assert found == found[:1] * 4
