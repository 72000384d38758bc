"""What a decode step is made of on CUDA: its kernels in a trace, and the edges between them in its graph.

    trace_step(model, filled=105, tokens=1)

A programmatic edge lets a kernel start before the one ahead has ended (programmatic dependent launch): its first
copies then overlap the other's end. How many there are, the driver says (`cuGraphGetEdges`, CUDA 12.3 and later);
whether kernels did overlap, the trace says. A profiler slows the edges, so times of whole steps are not from here.
"""

import ctypes
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from fastgen.load import LoadedModel
from fastgen.stage_times import capture_step

PROGRAMMATIC = 1  # CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC


class Kernel(NamedTuple):
    """A kernel, or a copy, as it ran: microseconds of the trace's clock."""

    name: str
    start: float
    end: float


def trace_step(model: LoadedModel, *, filled: int, tokens: int) -> dict[str, object]:
    """Return the kernels of one greedy step of `tokens` tokens behind `filled` on CUDA: see `describe`, and the edges
    of its graph."""
    graph = capture_step(model, filled=filled, tokens=tokens)
    edges = edge_types(graph.raw_cuda_graph())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(2):  # the first one finds the profiler starting
            graph.replay()
            torch.cuda.synchronize()
    kernels = [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events()
        if event.device_type == DeviceType.CUDA
    ]
    kernels.sort(key=lambda kernel: kernel.start)
    programmatic = None if edges is None else edges.count(PROGRAMMATIC)
    return describe(kernels[len(kernels) // 2 :]) | {
        "edges": None if edges is None else len(edges), "programmatic_edges": programmatic,
    }  # fmt: skip


def describe(kernels: list[Kernel]) -> dict[str, object]:
    """Return what a step's kernels, in the order of their starts, come to.

    `kernels` by name with how often and how long together, in microseconds; `count`; `span_us` from the first start to
    the last end, `idle_us` of it in which none ran; `overlaps`, how many started before the end of those ahead.
    """
    by_name: dict[str, list[float]] = {}
    idle, overlaps, end = 0.0, 0, kernels[0].start if kernels else 0.0
    for place, kernel in enumerate(kernels):
        by_name.setdefault(kernel.name, []).append(kernel.end - kernel.start)
        idle += max(0.0, kernel.start - end)
        overlaps += place > 0 and kernel.start < end
        end = max(end, kernel.end)
    longest_first = sorted(by_name.items(), key=lambda item: -sum(item[1]))
    return {
        "kernels": [{"kernel": name, "count": len(times), "us": sum(times)} for name, times in longest_first],
        "count": len(kernels),
        "span_us": end - kernels[0].start if kernels else 0.0,
        "idle_us": idle,
        "overlaps": overlaps,
    }


def edge_types(graph: int) -> list[int] | None:
    """Return the types of a CUDA graph's edges (0 full, 1 programmatic); None from a driver that does not say."""
    query = getattr(ctypes.CDLL("libcuda.so.1"), "cuGraphGetEdges_v2", None)
    if query is None:
        return None
    handle, count = ctypes.c_void_p(graph), ctypes.c_size_t(0)
    if query(handle, None, None, None, ctypes.byref(count)):
        return None
    nodes = ctypes.c_void_p * count.value
    data = (ctypes.c_uint8 * 8 * count.value)()  # CUgraphEdgeData: from_port, to_port, type, five bytes reserved
    if query(handle, nodes(), nodes(), data, ctypes.byref(count)):
        return None
    return [edge[2] for edge in data]
