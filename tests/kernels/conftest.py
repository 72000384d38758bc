"""The streaming stages on `machine`, and their kernels compiled for GPUs that need not be there."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import triton

from fastgen.kernels import attend, head, launch, linear_add, norm_linear, norm_swiglu, packed, packed_linear, product
from fastgen.kernels.launch import Shape
from tests.kernels import support
from tests.kernels.machine import OnMachine

KERNELS: tuple[tuple[Any, str, tuple[str, ...]], ...] = (
    (norm_linear, "norm_linear_kernel", ("x",)),
    (attend, "attend_kernel", ("qkv",)),
    (linear_add, "linear_add_kernel", ("x", "residual")),
    (norm_swiglu, "norm_swiglu_kernel", ("x",)),
    (head, "greedy_head_kernel", ("x",)),
    (head, "pick_token_kernel", ("best", "ids")),
)
"""Module, kernel, and what of its arguments the kernel ahead of it may have written."""

PACKED = {
    "packed_linear_kernel": ("x", "residual", "factors"), "packed_best_kernel": ("x", "factors"),
    "packed_swiglu_kernel": ("x", "factors"),
    "prepare_kernel": ("x",), "pick_token_kernel": ("best", "ids"),
}  # fmt: skip
"""The same of the kernels in `packed_linear`, by their names."""

TYPES = {"best": "*fp32", "ids": "*i32", "claims": "*i32", "boxes": "*i64", "calls": "*i32", "eps": "fp32"}
TYPES |= dict.fromkeys(("tokens", "n", "own", "tiles", "rank"), "i32")


@pytest.fixture
def on_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Stages run on the machine, two multiprocessors of sm_90; call it to choose the shape, or to launch for sm_80."""

    def choose(shape: Shape, *, dependent: bool = True) -> None:
        monkeypatch.setattr(launch, "dependent_launch", lambda device: {"launch_pdl": True} if dependent else {})
        monkeypatch.setattr(
            launch, "choose", lambda weight, stage, tokens, *, rows: launch.fitted(shape, weight, tokens, rows)
        )

    for module, name, ahead in KERNELS:
        monkeypatch.setattr(module, name, OnMachine(getattr(module, name), ahead))
    choose(Shape(1, 1, 2, 0))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    yield choose
    torch.use_deterministic_algorithms(False)
    assert not launch.workspace(torch.device("cpu")).any(), "tickets and claims are left at 0"


@pytest.fixture
def packed_on_machine(monkeypatch: pytest.MonkeyPatch, on_machine: Callable[..., None]) -> None:
    """The kernels with packed weights run on the machine too."""
    for name, ahead in PACKED.items():
        monkeypatch.setattr(packed_linear, name, OnMachine(getattr(packed_linear, name), ahead))
    for name in ("pack_int4_kernel", "pack_int8_kernel"):
        monkeypatch.setattr(packed, name, OnMachine(getattr(packed, name)))


@pytest.fixture
def assert_streams(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compile a stage's kernel for a GPU in the shape that it would have there, and look at the code."""

    def check(
        kernel: Any, stage: str, tokens: int, capability: int, element: str, constants: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:  # fmt: skip
        width = 4096
        monkeypatch.setattr(launch, "processor_memory", lambda device: support.SHARED_MEMORY[capability])
        monkeypatch.setattr(launch, "dependent_launch", lambda device: {"launch_pdl": True} if capability >= 90 else {})
        shapes = launch.table()["NVIDIA H200"][stage] if capability >= 90 else launch.DEFAULT
        shape = shapes[launch.column(tokens)]
        options = launch.fitted(shape, torch.empty(4096, width, device="meta"), tokens, 4096).options
        given = {name: options[name] for name in ("R", "SETS", "DEPTH", "PDL", "WARPS")} | (constants or {})
        arguments = {name: TYPES.get(name, element) for name in kernel.arg_names}
        compiled = support.compile_ahead(
            kernel, capability, arguments, given | {"K": width, "bias": None}, warps=product.WARPS, **more
        )
        lines = product.WARPS * options["DEPTH"] * options["R"] * product.LINES
        lines += 1 + (triton.cdiv(width, 4 * product.WIDE) * product.WARPS if tokens == 1 else 0)
        support.assert_streams(compiled, 512 * lines, capability, shape.per_processor)

    return check
