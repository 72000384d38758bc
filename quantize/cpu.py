"""Few tokens times packed weights on a CPU: `cpu_product.cpp`, or PyTorch's kernels where there is no C++ compiler.

PyTorch's (`_weight_int8pack_mm`, `_weight_int4pack_mm_for_cpu`) are fast in bf16 alone and, on AVX2, bound by
unpacking: int4 decodes slower than int8 there. Ours round activations to 16 bits (2e-5 of a product's size, where bf16
has 2e-3), keep the layout that is on disk, and are compiled once for the machine, in a second, into the user's cache.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SOURCE = Path(__file__).with_name("cpu_product.cpp")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC", "-std=c++17")
INT4_BLOCK, INT8_BLOCK = 64, 32  # weights of a row that are unpacked together
ATEN_ROWS = 16  # PyTorch's int4 kernel takes rows in multiples of these


class NativeInt8(nn.Module):
    """int8 weights times a few tokens by our kernel; `in` is a multiple of 32."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale[:, 0].float().contiguous(), persistent=False)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [M, in] times weight [out, in], [M, out] fp32."""
        return _int8_product(x.float().contiguous(), weight, self.scale)


class NativeInt4(nn.Module):
    """int4 weights times a few tokens by our kernel; `in` is a multiple of 64."""

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: Tensor, zero_point: Tensor | None) -> None:
        super().__init__()
        wide = scale.float().contiguous()
        offset = 8 * wide if zero_point is None else (8 + zero_point.float()) * wide
        self.register_buffer("scale", wide, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """Return x [M, in] times packed [out, in / 8], [M, out] fp32."""
        return _int4_product(x.float().contiguous(), packed, self.scale, self.offset)


class AtenInt8(nn.Module):
    """int8 weights times a few tokens by PyTorch's kernel, in bf16; it does not check that `in` is a multiple of 32."""

    scale: Tensor

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale[:, 0].to(torch.bfloat16).contiguous(), persistent=False)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x [M, in] times weight [out, in], [M, out] bf16."""
        return torch._weight_int8pack_mm(x.to(torch.bfloat16), weight, self.scale)


class AtenInt4(nn.Module):
    """int4 weights times a few tokens by PyTorch's kernel, in bf16, from a copy of the weights in its own order."""

    weight: Tensor  # [out, in / 2] uint8
    scale_zero: Tensor  # [groups, out, 2] bf16: w = (q - 8) * scale + zero, with q in 0 .. 15

    def __init__(self, q: Tensor, scale: Tensor, zero_point: Tensor | None) -> None:
        super().__init__()
        wide = scale.float()
        zero = torch.zeros_like(wide) if zero_point is None else -zero_point.float() * wide
        weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q + 8, 1)
        self.register_buffer("weight", weight, persistent=False)
        pairs = torch.stack((wide.T, zero.T), dim=2).to(torch.bfloat16).contiguous()
        self.register_buffer("scale_zero", pairs, persistent=False)
        self.group_size = q.shape[1] // scale.shape[1]

    def forward(self, x: Tensor, packed: Tensor) -> Tensor:
        """Return x [M, in] times the weights, [M, out] bf16."""
        return _aten_int4_product(x.to(torch.bfloat16), self.weight, self.scale_zero, self.group_size)


def int8_product(weight: Tensor, scale: Tensor) -> nn.Module | None:
    """Return what multiplies a few tokens with these weights, None where the definition must do."""
    if not weight.is_cpu or weight.shape[1] % INT8_BLOCK:
        return None
    return NativeInt8(scale) if _library() else AtenInt8(scale)


def int4_product(
    packed: Tensor, unpack: Callable[[], Tensor], scale: Tensor, zero_point: Tensor | None
) -> nn.Module | None:
    """Return what multiplies a few tokens with these weights, None where the definition must do.

    `unpack` gives q [out, in] int32 in -8 .. 7 of `packed`, for the kernel that has an order of its own.
    """
    if not packed.is_cpu:
        return None
    if 8 * packed.shape[1] % INT4_BLOCK == 0 and _library():
        return NativeInt4(scale, zero_point)
    return AtenInt4(unpack(), scale, zero_point) if packed.shape[0] % ATEN_ROWS == 0 else None


@torch.library.custom_op("fastgen::int8_product", mutates_args=())
def _int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    library = _library()
    assert library is not None, "the kernel was there when the model was loaded"
    (rows, columns), tokens = weight.shape, x.shape[0]
    y = x.new_empty(tokens, rows)
    sizes = [ctypes.c_int64(size) for size in (tokens, rows, columns)]
    library.int8_product(*map(_pointer, (x, weight, scale, y)), *sizes, torch.get_num_threads())
    return y


@_int8_product.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("fastgen::int4_product", mutates_args=())
def _int4_product(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    library = _library()
    assert library is not None, "the kernel was there when the model was loaded"
    (rows, words), tokens = packed.shape, x.shape[0]
    y = x.new_empty(tokens, rows)
    sizes = [ctypes.c_int64(size) for size in (tokens, rows, 8 * words, 8 * words // scale.shape[1])]
    library.int4_product(*map(_pointer, (x, packed, scale, offset, y)), *sizes, torch.get_num_threads())
    return y


@_int4_product.register_fake
def _(x: Tensor, packed: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


# An op of its own: Inductor (2.13) lowers PyTorch's inside a compiled region to a call that refuses its group size.
@torch.library.custom_op("fastgen::aten_int4_product", mutates_args=())
def _aten_int4_product(x: Tensor, weight: Tensor, scale_zero: Tensor, group_size: int) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, group_size, scale_zero)


@_aten_int4_product.register_fake
def _(x: Tensor, weight: Tensor, scale_zero: Tensor, group_size: int) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous(), "the kernels take whole rows"
    return ctypes.c_void_p(tensor.data_ptr())


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled kernels, None on a machine that cannot compile them."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    key = hashlib.sha256(SOURCE.read_bytes() + f"{compiler} {FLAGS} {_processor()}".encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastgen"
    target = cache / f"cpu_product-{key}.so"
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True, mode=0o700)
            staging = target.with_suffix(f".{os.getpid()}")
            subprocess.run([compiler, *FLAGS, "-o", staging, SOURCE], check=True, capture_output=True)
            staging.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """Return what tells machines apart that share a home folder: the processor and what it can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
