"""Where and in which precision to run, decided once, with the reason."""

from dataclasses import dataclass

import psutil
import torch

from fastgen.errors import CapacityError, UsageError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Placement:
    """A device, the dtype of weights and activations on it, and why this dtype."""

    device: torch.device
    dtype: torch.dtype
    reason: str


def choose_placement(device: str | None = None, dtype: str | None = None) -> Placement:
    """Return where to run; `None` lets the machine decide.

    Args:
        device: "cuda", "cuda:N" or "cpu"; by default cuda where there is one.
        dtype: "bf16", "fp16" or "fp32"; by default bf16, fp16 on GPUs below sm_80, fp32 on CPUs without
            AVX512-BF16 (they convert every bf16 weight in software, which costs more than the bytes it saves).

    Raises:
        UsageError: the device is not there or not known.
    """
    place = _choose_device(device)
    if dtype is not None:
        if dtype not in DTYPES:
            raise UsageError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
        return Placement(place, DTYPES[dtype], "as asked")
    if place.type == "cuda":
        major, minor = capability(place)
        if major < 8:
            return Placement(place, torch.float16, f"sm_{major}{minor} has no bf16 arithmetic")
        return Placement(place, torch.bfloat16, "the GPU's native precision")
    if torch.cpu._is_avx512_bf16_supported():
        return Placement(place, torch.bfloat16, "the CPU has AVX512-BF16")
    return Placement(place, torch.float32, "the CPU has no AVX512-BF16")


def _choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: not a device; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            built = "finds no NVIDIA GPU" if torch.version.cuda else "is a build without CUDA"
            raise UsageError(f"--device {name}: PyTorch {torch.__version__} {built}; use --device cpu")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: this machine has {count} GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def describe(device: torch.device) -> str:
    """Return the device's name, for people and for results."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"


def capability(device: torch.device) -> tuple[int, int]:
    """Return an NVIDIA GPU's compute capability, (9, 0) for Hopper, and (0, 0) for other devices."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be allocated on the device."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available


def require_memory(device: torch.device, need: int, what: str, way_out: str) -> None:
    """Raise `CapacityError` if `need` bytes for `what` are not free; on a CPU no later failure would say so."""
    free = free_memory(device)
    if need > free:
        raise CapacityError(
            f"{what} needs {need / 1e9:.1f} GB on {device}, {free / 1e9:.1f} GB are free\nUse {way_out}"
        )


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
