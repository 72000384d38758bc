"""The stages together: what falls back to the reference, and that a chain of dependent launches loses nothing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastgen.config import ModelConfig, RopeScaling
from fastgen.graphs import without_collection
from fastgen.kernels import fixed_point, fused, launch, reference
from fastgen.kernels.packed import PackedLinear
from fastgen.kernels.rope import Rope
from fastgen.model import Transformer
from tests.kernels import support
from tests.kernels.support import on_gpu

CONFIG = ModelConfig(
    dim=512, n_layers=6, n_heads=8, n_kv_heads=2, head_dim=64, hidden_dim=1408, vocab_size=4096, max_seq_len=512
)


def random_model(stages: object, device: str, dtype: torch.dtype) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG, stages)
    for name, parameter in model.named_parameters():
        nn.init.constant_(parameter, 1.0) if "norm" in name else nn.init.normal_(parameter, std=512**-0.5)
    model = model.to(device, dtype)
    model.allocate_cache(1, 512)
    return model


class AsOnGpu(Tensor):
    """A tensor of the CPU that says that it is on a GPU."""

    is_cuda = True


class Kernels(TorchDispatchMode):
    """Notes which kernels are called, and launches none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: object, types: object, arguments: tuple = (), keywords: dict | None = None):
        if function.namespace != "fastgen":
            return function(*arguments, **(keywords or {}))
        self.names.append(function.overloadpacket.__name__)
        return torch.empty(())


def kernels_of(stage: Callable[..., Tensor], tensor: Tensor, *arguments: object) -> list[str]:
    """Return the kernels that a stage calls whose first argument is on a GPU."""
    with Kernels() as called:
        stage(tensor.as_subclass(AsOnGpu), *arguments)
    return called.names


def test_on_a_cpu_every_stage_is_the_references() -> None:
    tokens, positions, keys = torch.arange(5)[None], torch.arange(5)[None], torch.arange(5)
    outputs = []
    for stages in (fused, reference):
        model = random_model(stages, "cpu", torch.float32)
        outputs.append(model.logits(model(tokens, positions, keys, torch.tensor([5]))))
    assert torch.equal(*outputs)


@on_gpu
def test_prefill_widths_and_fp32_go_to_the_reference() -> None:
    norm = support.norm(64, dtype=torch.bfloat16, device="cuda")
    linear = support.linear(32, 64, bias=False, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 17, 64, device="cuda", dtype=torch.bfloat16)
    assert torch.equal(fused.norm_linear(x, norm, linear), reference.norm_linear(x, norm, linear))
    wide = torch.randn(1, 2, 64, device="cuda")
    assert torch.equal(fused.norm_linear(wide, norm.float(), linear.float()), reference.norm_linear(wide, norm, linear))


@on_gpu
def test_rows_that_do_not_begin_at_16_bytes_go_to_the_reference() -> None:
    norm = support.norm(63, dtype=torch.bfloat16, device="cuda")
    linear = support.linear(34, 63, bias=True, dtype=torch.bfloat16, device="cuda")
    x = torch.randn(1, 3, 63, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(1, 3, 34, device="cuda", dtype=torch.bfloat16)
    for name in ("norm_linear", "norm_swiglu", "head", "greedy_head"):
        assert torch.equal(getattr(fused, name)(x, norm, linear), getattr(reference, name)(x, norm, linear)), name
    assert torch.equal(fused.linear_add(x, linear, residual), reference.linear_add(x, linear, residual))
    assert torch.equal(fused.partial_linear(x, linear), reference.partial_linear(x, linear).float())


@pytest.mark.parametrize(("width", "covered"), [(72, True), (68, False), (63, False)])
def test_rows_that_begin_at_16_bytes_go_to_the_kernels_and_others_do_not(width: int, covered: bool) -> None:
    norm = support.norm(width, dtype=torch.bfloat16, device="cpu")
    linear = support.linear(34, width, bias=True, dtype=torch.bfloat16, device="cpu")
    x, residual = torch.ones(1, 3, width, dtype=torch.bfloat16), torch.ones(1, 3, 34, dtype=torch.bfloat16)
    for name in ("norm_linear", "norm_swiglu", "head", "greedy_head"):
        assert kernels_of(getattr(fused, name), x, norm, linear) == [name] * covered
    assert kernels_of(fused.linear_add, x, linear, residual) == ["linear_add"] * covered
    assert kernels_of(fused.partial_linear, x, linear) == ["partial_linear"] * covered


@pytest.mark.parametrize(
    ("kind", "tokens", "covered"), [("yarn", 16, True), ("yarn", 17, False), ("dynamic", 1, False)]
)
def test_rotations_of_prefill_or_that_hang_on_a_texts_length_go_to_the_reference(
    kind: str, tokens: int, covered: bool
) -> None:
    rope = Rope(replace(CONFIG, rope_scaling=RopeScaling(kind=kind, factor=2.0, original_max_seq_len=256)))
    positions, lengths = torch.arange(tokens)[None], torch.tensor([tokens])
    assert kernels_of(fused.rotations, positions, lengths, rope) == ["rotations"] * covered


@on_gpu
@torch.inference_mode()
def test_a_graph_of_dependent_launches_gives_the_tokens_of_launches_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(fused, "cuda", torch.bfloat16)
    fused.prepare(torch.device("cuda", 0))
    token, position, length = (torch.zeros(shape, dtype=torch.int64, device="cuda") for shape in ((1, 1), (1, 1), (1,)))
    keys = torch.arange(512, device="cuda")
    history = torch.zeros(512, dtype=torch.int64, device="cuda")

    def step() -> None:
        hidden = model(token, position, keys, length)
        token.copy_(fused.greedy_head(hidden, model.norm, model.lm_head))
        history.scatter_(0, position[0], token[0])
        position.add_(1)
        length.add_(1)

    def restart() -> None:
        for tensor in (token, position, length):
            tensor.zero_()
        length.add_(1)

    def alone() -> Tensor:
        restart()
        for _ in range(400):
            step()
            torch.cuda.synchronize()
        return history.clone()

    with monkeypatch.context() as patch:
        patch.setattr(launch, "dependent_launch", lambda device: {})
        expected = alone()
    assert torch.equal(alone(), expected), "dependent launches, one step at a time"

    graph = torch.cuda.CUDAGraph()
    with without_collection(), torch.cuda.graph(graph):
        step()
    history.fill_(-7)
    restart()
    for _ in range(400):
        graph.replay()
    assert torch.equal(history[:400], expected[:400]), "a graph, replayed without a pause"


def packed(columns: int, rows: int = 16) -> PackedLinear:
    nothing = torch.empty(0, dtype=torch.int32)
    return PackedLinear(nothing, nothing, None, out_features=rows, in_features=columns, dtype=torch.bfloat16)


@pytest.fixture
def any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets what asks whether a tensor is CUDA's take any device for it."""
    monkeypatch.setattr(fused, "_narrow", lambda tensor: tensor.dtype in (torch.bfloat16, torch.float16))


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(("columns", "covered"), [(launch.MAX_COLUMNS, True), (launch.MAX_COLUMNS + 1, False)])
def test_more_columns_than_a_program_has_warps_for_are_left_to_the_reference(columns: int, covered: bool) -> None:
    assert fused.covers(nn.ModuleDict({"w_down": packed(columns)}), 64, 16) is covered
    assert (fixed_point.preparing_warps(columns) <= 32) is covered


@pytest.mark.usefixtures("any_device")
@pytest.mark.parametrize(
    ("tokens", "changed", "covered"),
    [
        (1, {}, True),
        (16, {}, True),
        (17, {}, False),
        (1, {"head_dim": 72}, False),
        (1, {"hidden_dim": 1412}, False),
        (1, {"hidden_dim": launch.MAX_COLUMNS + 8}, False),
    ],
)
def test_what_some_stage_leaves_to_the_reference_is_not_covered(
    tokens: int, changed: dict[str, int], covered: bool
) -> None:
    config = replace(CONFIG, **changed)
    with torch.device("meta"):
        model = Transformer(config, fused).to(torch.bfloat16)
    assert fused.covers(model, config.head_dim, tokens) is covered
    if covered:
        model.layers[0].w_gate_up = packed(512, rows=2 * 1408)
        assert fused.covers(model, config.head_dim, tokens)
        model.layers[0].w_gate_up = packed(512, rows=2 * 1408 + 2)
        assert not fused.covers(model, config.head_dim, tokens), "a tile of 16 rows with half of a pair"
        model.layers[0].w_gate_up = nn.Linear(512, 2 * 1408, bias=False, device="meta", dtype=torch.bfloat16)
        model.norm = model.norm.float()
        assert not fused.covers(model, config.head_dim, tokens), "gains are read in the dtype of x"


@pytest.mark.usefixtures("any_device")
def test_gains_of_another_dtype_are_left_to_the_reference() -> None:
    x, norm = torch.randn(1, 1, 64).bfloat16(), support.norm(64, dtype=torch.float32, device="cpu")
    rows = support.linear(32, 64, bias=False, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(fused.norm_linear(x, norm, rows), reference.norm_linear(x, norm, rows))
    assert torch.equal(fused.norm_swiglu(x, norm, rows), reference.norm_swiglu(x, norm, rows))
    assert torch.equal(fused.head(x, norm, rows), reference.head(x, norm, rows))
