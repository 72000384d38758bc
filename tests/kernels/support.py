"""What the kernel tests share: random stages, the fp32 oracle with the 2x rule, compilation without a GPU.

A kernel's error is measured against the reference in fp64 on the same (rounded) inputs, and may be at most twice the
error that PyTorch makes in the kernel's dtype.
"""

import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py in a process of its own")
compiled_ahead = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device, and skip it without one."""
    missing = not torch.cuda.is_available() or INTERPRETED
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


TARGETS = ((80, False), (90, True))
"""Compute capability, and whether programmatic dependent launch is there."""


def linear(out: int, width: int, *, bias: bool, dtype: torch.dtype, device: str) -> nn.Linear:
    """A linear with weights of about 1 / sqrt(width)."""
    module = nn.Linear(width, out, bias=bias)
    nn.init.normal_(module.weight, std=width**-0.5)
    return module.to(device, dtype).requires_grad_(False)


def norm(width: int, *, dtype: torch.dtype, device: str) -> nn.RMSNorm:
    """An RMSNorm whose gains differ."""
    module = nn.RMSNorm(width, eps=1e-5)
    nn.init.uniform_(module.weight, 0.5, 1.5)
    return module.to(device, dtype).requires_grad_(False)


def in_fp64(module: nn.Module | None) -> nn.Module | None:
    """The same module with its rounded weights in fp64."""
    if module is None:
        return None
    weights = {name: value.double() for name, value in module.state_dict().items()}
    if isinstance(module, nn.RMSNorm):
        copy: nn.Module = nn.RMSNorm(module.normalized_shape, eps=module.eps, dtype=torch.float64)
    else:
        copy = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None, dtype=torch.float64)
    copy.to(next(iter(weights.values())).device).load_state_dict(weights)
    return copy.requires_grad_(False)


def distance(actual: Tensor, exact: Tensor) -> float:
    """Relative RMS error; NaN never passes a comparison."""
    return float((actual.double() - exact).norm() / exact.norm())


def assert_as_good_as(actual: Tensor, torch_result: Tensor, exact: Tensor, name: str) -> None:
    """Fail when the kernel's error is more than twice PyTorch's (plus a last digit of fp32)."""
    ours, theirs = distance(actual, exact), distance(torch_result, exact)
    assert ours <= 2 * theirs + 1e-6, f"{name}: relative error {ours:.2e}, PyTorch's is {theirs:.2e}"


def compile_ahead(
    kernel: Any, capability: int, arguments: dict[str, str], constants: dict[str, Any], *, warps: int = 4,
    ones: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """Compile a kernel for a GPU that need not be there; return its TTGIR (Triton's IR, after pipelining).

    `ones` are arguments that are 1 at the launch, which Triton makes constants unless it is told not to.
    """
    constants = constants | {p.name: 1 for p in kernel.params if p.name in ones and not p.do_not_specialize}
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if signature[name].startswith("*")
    }
    options = {"num_warps": warps} | ({"launch_pdl": True} if capability >= 90 else {})
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], "ptxas gives a binary"
    return compiled.asm["ttgir"]


def assert_waits_between(ttgir: str) -> None:
    """Weights are copied before the kernel waits for the one ahead of it; activations are read after it."""
    lines = [line for line in ttgir.splitlines() if "loc(" not in line[:5]]
    wait = next(n for n, line in enumerate(lines) if "griddepcontrol.wait" in line)
    copies = [n for n, line in enumerate(lines) if "ttg.async_copy_global_to_local" in line]
    loads = [n for n, line in enumerate(lines) if "tt.load" in line]
    assert copies and copies[0] < wait, "no weights are copied before the wait"
    assert loads and wait < loads[0], "something is read before the wait that may not be written yet"


def assert_one_order(ttgir: str) -> None:
    """The tensor cores take K in the same order however x was loaded."""
    assert set(re.findall("kWidth = [0-9]+", ttgir)) == {"kWidth = 2"}


def poisoned(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call an op while the allocator's free memory is full of NaN, so that what it leaves unwritten shows."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        torch.full((size,), float("nan"), device="cuda")
    return function(*arguments)
