"""How fast a device's memory can be read: the floor of every decode step is its bytes over this.

Measured on the device itself, in the same run as the speed that stands beside it, never taken from a datasheet.
"""

import statistics
import time

import torch

GPU_BYTES = 4 << 30  # far beyond any cache
CPU_BYTES = 1 << 28
PROGRAMS_PER_MULTIPROCESSOR = 4


def measure_read_bandwidth(device: torch.device, *, repeats: int = 5) -> float:
    """Return GB/s (1e9 bytes) of a read-only pass: the median on CUDA, the best on a CPU that others use too."""
    if device.type == "cuda":
        return _measure_cuda(device, repeats)
    data = torch.ones(CPU_BYTES // 4)
    data.sum()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return CPU_BYTES / best / 1e9


def _measure_cuda(device: torch.device, repeats: int) -> float:
    from fastgen.kernels.read_sum import read_sum  # noqa: PLC0415  (Triton, which CPU builds of torch lack)

    free, _ = torch.cuda.mem_get_info(device)
    size = min(GPU_BYTES, free // 2)
    data = torch.ones(size // 4, device=device)
    programs = torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_MULTIPROCESSOR
    out = torch.empty(programs, device=device)
    times = []
    for repeat in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        read_sum(data, out)
        end.record()
        end.synchronize()
        if repeat >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return data.numel() * 4 / statistics.median(times) / 1e9
