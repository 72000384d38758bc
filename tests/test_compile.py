"""Compiled generation gives eager's tokens, and compiles nothing after its start, whatever comes."""

from dataclasses import replace

import psutil
import pytest
import torch
from torch._dynamo.utils import counters

from fastgen import session
from fastgen.device import Placement
from fastgen.engine import Engine
from fastgen.errors import RecompiledError, UsageError
from fastgen.flags import ModelFlags
from fastgen.load import use_kernels
from fastgen.naive import generate_naively
from fastgen.options import GenerationOptions, SamplingOptions
from tests.models import random_model
from tests.test_engine import text_of
from tp.dist import Ranks
from tp.place import Place
from tp.plan import make_plan

FAMILIES = {
    "llama": {},
    "everything": {
        "qkv_bias": True, "output_bias": True, "mlp_bias": True, "qk_norm": True, "windows": (5, 0), "head_dim": 16,
        "tie_embeddings": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_eager_and_naive_tokens_are_equal_and_nothing_recompiles(family: str) -> None:
    model = random_model(max_seq_len=800, **FAMILIES[family])
    compiled, greedy = Engine(model, compile=True), GenerationOptions(max_new_tokens=24, ignore_eos=True)
    compiled.warm_up(greedy)
    prompts = [text_of(length, length) for length in (7, 700, 1, 130)]
    tokens = [compiled.generate([prompt], greedy)[0].tokens for prompt in prompts]
    assert compiled.recompiles == 0
    eager = Engine(model)
    assert tokens == [eager.generate([prompt], greedy)[0].tokens for prompt in prompts]
    assert list(tokens[0]) == generate_naively(model, prompts[0], 24, greedy.sampling)


def test_sampled_rows_of_a_compiled_batch_equal_eager_single_rows() -> None:
    model = random_model()
    prompts = [text_of(3, 1), text_of(40, 2)]
    sampling = SamplingOptions(temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.1, seed=3)
    options = GenerationOptions(max_new_tokens=20, ignore_eos=True, logprobs=True, sampling=sampling)
    compiled = Engine(model, batch=2, compile=True)
    compiled.warm_up(options)
    together = compiled.generate(prompts, options)
    for step in range(1, 12):
        tenth = step / 20
        other = SamplingOptions(
            temperature=0.3 + tenth, top_k=40, top_p=1 - tenth, repetition_penalty=1 + tenth, seed=step
        )
        compiled.generate(prompts, GenerationOptions(max_new_tokens=4, logprobs=True, sampling=other))
    assert compiled.recompiles == 0, "other numbers are no other graph"
    for row, prompt in enumerate(prompts):
        streams: list = []
        list(Engine(model).stream([prompt], options, streams=streams, samples=[row]))
        alone = streams[0].completion()
        assert together[row].tokens == alone.tokens
        assert together[row].logprobs == pytest.approx(alone.logprobs, abs=1e-4)


def test_a_graph_that_the_start_did_not_foresee_is_counted_and_can_be_an_error() -> None:
    engine = Engine(random_model(), compile=True)
    engine.warm_up()
    engine.generate([text_of(5)], GenerationOptions(max_new_tokens=3))
    session.check_recompiles(ModelFlags(fail_on_recompile=True), engine)
    sampling = SamplingOptions(temperature=1.0, top_k=7)
    engine.generate([text_of(5)], GenerationOptions(max_new_tokens=3, sampling=sampling))
    assert engine.recompiles == 1
    session.check_recompiles(ModelFlags(), engine)
    with pytest.raises(RecompiledError, match=r"1 graph\(s\) were compiled after the start"):
        session.check_recompiles(ModelFlags(fail_on_recompile=True), engine)


@pytest.mark.gpu
@pytest.mark.parametrize("single", [False, True])
def test_cuda_graphs_are_kept_and_give_eagers_tokens(single: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bursts, and of single steps at the end, as a model has them that is not small."""
    monkeypatch.setattr("fastgen.graphs.SINGLE_BYTES", 0 if single else 1 << 40)
    counters.clear()
    model = random_model(device="cuda", max_seq_len=1200)
    compiled, greedy = Engine(model, compile=True), GenerationOptions(max_new_tokens=24, ignore_eos=True)
    compiled.warm_up(greedy)
    prompts = [text_of(length, length) for length in (7, 700, 1, 130)]
    tokens = [compiled.generate([prompt], greedy)[0].tokens for prompt in prompts]
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert compiled.recompiles == 0
    eager = Engine(model)
    assert tokens == [eager.generate([prompt], greedy)[0].tokens for prompt in prompts]


@pytest.mark.gpu
def test_sampled_texts_are_equal_eager_and_in_cuda_graphs() -> None:
    model = random_model(device="cuda")
    prompts = [text_of(3, 1), text_of(40, 2)]
    sampling = SamplingOptions(temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=3)
    options = GenerationOptions(max_new_tokens=40, ignore_eos=True, logprobs=True, sampling=sampling)
    compiled = Engine(model, batch=2, compile=True)
    compiled.warm_up(options)
    for _ in range(2):
        found = [row.tokens for row in compiled.generate(prompts, options)]
        assert found == [row.tokens for row in Engine(model, batch=2).generate(prompts, options)]
    assert compiled.generate(prompts, options)[0].logprobs


@pytest.mark.long
@pytest.mark.parametrize("compile", [False, True])
def test_a_thousand_texts_in_one_process_keep_memory_flat(compile: bool) -> None:
    engine = Engine(random_model(), compile=compile)
    process = psutil.Process()
    sizes = []
    for number in range(1000):
        sampling = SamplingOptions(temperature=0.8, seed=number)
        options = GenerationOptions(max_new_tokens=8, ignore_eos=True, sampling=sampling)
        if number == 0:
            engine.warm_up(options)
        engine.generate([text_of(1 + number * 7 % 200, number)], options)
        sizes.append(process.memory_info().rss)
    assert max(sizes[200:]) <= 1.01 * sizes[200]
    assert engine.recompiles == 0


@pytest.mark.parametrize(("generation", "name"), [((7, 5), "reference"), ((8, 0), "fused"), ((9, 0), "fused")])
def test_gpus_that_the_kernels_are_not_made_for_take_the_reference(
    generation: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = random_model(), []
    on_gpu = replace(model, placement=Placement(torch.device("cuda"), torch.float16, "as asked"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: generation)
    monkeypatch.setattr("fastgen.kernels.fused.prepare", chosen.append)
    use_kernels(on_gpu, "auto", compile=True)
    assert on_gpu.transformer.stages.__name__ == f"fastgen.kernels.{name}" and bool(chosen) is (name == "fused")
    part = replace(on_gpu, plan=make_plan(model.config, {}, 2, 0), ranks=Ranks(Place(0, 2, 0)))
    use_kernels(part, "auto", compile=True)
    assert part.transformer.stages.rotations.__module__ == f"fastgen.kernels.{name}", "several ranks take the same"
    if name == "reference":
        with pytest.raises(UsageError, match="only in bf16 or fp16 on NVIDIA GPUs from sm_80"):
            use_kernels(on_gpu, "fused", compile=True)
