"""What the kernel tests share: random stages, the fp32 oracle with the 2x rule, compilation without a GPU.

A kernel's error is measured against the reference in fp64 on the same (rounded) inputs, and may be at most twice the
error that PyTorch makes in the kernel's dtype.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_interpreter.py in a process of its own")
compiled_ahead = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that needs a CUDA device, and skip it without one."""
    missing = not torch.cuda.is_available() or INTERPRETED
    return pytest.mark.gpu(pytest.mark.skipif(missing, reason="needs a CUDA device")(test))


TARGETS = ((80, False), (90, True))
"""Compute capability, and whether programmatic dependent launch is there."""

SHARED_MEMORY = {80: 164 << 10, 90: 228 << 10}
"""Bytes of a multiprocessor by compute capability: CUDA C++ Programming Guide, "Technical Specifications"."""


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
    kernel: Any,
    capability: int,
    arguments: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int = 4,
    **options: Any,
) -> triton.compiler.CompiledKernel:  # fmt: skip
    """Compile a kernel of Triton or Gluon for a GPU that need not be there; `.asm` holds its code at every stage."""
    signature = {name: "constexpr" if name in constants else arguments[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if signature[name].startswith("*")
    }
    options |= {"num_warps": warps} | ({"launch_pdl": True} if capability >= 90 else {})
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(
        kernel, signature, constexprs=constants, attrs=aligned
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"], "ptxas gives a binary"
    return compiled


def usage(compiled: triton.compiler.CompiledKernel) -> dict[str, int]:
    """Return what ptxas gave a kernel: REG registers a thread, STACK and LOCAL bytes a thread, and more."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", said)}


def assert_streams(compiled: triton.compiler.CompiledKernel, ring: int, capability: int, programs: int) -> None:
    """A kernel of `product` keeps memory busy: copies from before its wait to the end, and nothing in their way.

    `ring` is what it allocates first, in bytes; so many programs shall run on a multiprocessor of a capability at once.
    """
    code, used = compiled.asm["ptx"], usage(compiled)
    copies = [found.start() for found in re.finditer("cp.async.cg.shared.global", code)]
    products = code.index("mma.sync.aligned.m16n8k16")
    assert copies[0] < products < copies[-1], "copies run ahead of the products, and on among them"
    if compiled.metadata.launch_pdl:
        assert copies[0] < code.index("griddepcontrol.wait") < products, "weights are copied before the wait"
    assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilled: {used}"
    others = [int(offset) for offset in re.findall(r"@global_smem, i32 (\d+)", compiled.asm["llir"])]
    assert others and min(others) >= ring, "the ring lies first in shared memory, and everything else behind it"
    assert used["REG"] * 32 * compiled.metadata.num_warps * programs <= 1 << 16, (
        f"registers of a multiprocessor: {used}"
    )
    assert (compiled.metadata.shared + 1024) * programs <= SHARED_MEMORY[capability], "shared memory"


def poisoned(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call an op while the allocator's free memory is full of NaN, so that what it leaves unwritten shows."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        torch.full((size,), float("nan"), device="cuda")
    return function(*arguments)
