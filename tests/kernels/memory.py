"""The memories of `machine`: tensors in global memory, and shared memory that knows who wrote and read each byte.

Both raise `Fault` where a GPU would read garbage, stop, or give what depends on chance.
"""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Places = NDArray[np.int64]
"""Byte addresses, [threads, size]."""

GAP = 1 << 16
"""Bytes between tensors, which nobody may touch."""

NEVER, COPYING, EVERYBODY, MANY = -4, -3, -2, -1
"""Who wrote or read a byte, if not one thread: nothing was written; a copy is under way; a barrier has passed since;
threads of several warps."""

SEVERAL, MET = 1 << 20, 1 << 21
"""Plus the number of a warp: several of its threads; threads that have met since in a barrier of their warp."""


class Fault(AssertionError):
    """What a kernel may not do."""


class GlobalMemory:
    """Tensors, each at a multiple of 256 bytes and far from the others."""

    def __init__(self, tensors: Iterable[Tensor], ahead: Iterable[Tensor] = ()) -> None:
        """`ahead`: tensors that the kernel ahead writes, which programs that have not waited for it may not read."""
        self._placed: dict[int, tuple[int, Tensor]] = {}
        top = GAP
        for tensor in tensors:
            assert tensor.is_contiguous() and tensor.device.type == "cpu", "kernels take contiguous tensors"
            if tensor.data_ptr() not in self._placed:
                self._placed[tensor.data_ptr()] = top, tensor
                top += (_bytes(tensor).size + GAP + 255) // 256 * 256
        self.data, self._open = np.full(top, 0xFF, np.uint8), np.zeros(top, bool)
        for place, tensor in self._placed.values():
            self.data[place : place + _bytes(tensor).size] = _bytes(tensor)
            self._open[place : place + _bytes(tensor).size] = True
        self._open_early = self._open.copy()
        for tensor in ahead:
            self._open_early[self.address(tensor) :][: _bytes(tensor).size] = False

    def address(self, tensor: Tensor) -> int:
        """Return where a tensor lies."""
        return self._placed[tensor.data_ptr()][0]

    def read(self, places: Places, early: bool) -> NDArray[np.uint8]:
        """Return the bytes at addresses; `early`: the program has not yet waited for the kernel ahead."""
        self._check(places, self._open_early if early else self._open, "read")
        return self.data[places]

    def write(self, places: Places, data: NDArray[np.uint8], early: bool) -> None:
        """Store bytes at addresses."""
        if places.size and early:
            raise Fault("a store before griddepcontrol.wait: the kernel ahead may still read what was there")
        self._check(places, self._open, "written")
        self.data[places] = data

    def give_back(self) -> None:
        """Copy what the memory holds into the tensors."""
        for place, tensor in self._placed.values():
            _bytes(tensor)[:] = self.data[place : place + _bytes(tensor).size]

    def _check(self, places: Places, are_open: NDArray[np.bool_], how: str) -> None:
        inside = (places >= 0) & (places < are_open.size)
        if inside.all() and are_open[places].all():
            return
        wrong = places[~(inside & are_open[np.where(inside, places, 0)])][0]
        for place, tensor in self._placed.values():
            if place <= wrong < place + _bytes(tensor).size:
                raise Fault(f"{list(tensor.shape)} is {how} before griddepcontrol.wait: the kernel ahead writes it")
        raise Fault(f"memory that belongs to no tensor is {how}")


def place_of(tensor: Tensor, tensors: Iterable[Tensor]) -> int:
    """Return where a tensor will lie, as one of a launch's."""
    return GlobalMemory(tensors).address(tensor)


class SharedMemory:
    """A program's shared memory.

    A thread sees what it wrote itself, and what others wrote before the last barrier; a copy (cp.async) is the
    thread's own write at the moment that it waits for it. Nobody may overwrite what another thread has read since the
    last barrier. So a missing barrier is a fault, whatever the order in which the threads happen to run here. What
    nobody wrote is NaN as a float of any size.
    """

    def __init__(self, size: int) -> None:
        self.data = np.full(size, 0xFF, np.uint8)
        self._writer, self._reader = np.full(size, NEVER, np.int32), np.full(size, EVERYBODY, np.int32)
        self._open: list[tuple[Places, NDArray[np.uint8], NDArray[np.int32]]] = []
        self._groups: list[list[tuple[Places, NDArray[np.uint8], NDArray[np.int32]]]] = []

    def read(self, places: Places, threads: NDArray[np.int32]) -> NDArray[np.uint8]:
        """Return the bytes at addresses [t, size], each row read by one of threads [t]."""
        self._inside(places)
        writer, own = self._writer[places], threads[:, None]
        if (writer == COPYING).any():
            raise Fault("shared memory is read while a copy into it is under way: its group was not waited for")
        if not _settled(writer, own).all():
            raise Fault("shared memory is read that another thread wrote since the last barrier")
        self._mark_read(places, own)
        return self.data[places]

    def write(self, places: Places, data: NDArray[np.uint8], threads: NDArray[np.int32]) -> None:
        """Store bytes at addresses [t, size] by threads [t]."""
        self._claim(places, threads)
        self.data[places] = data
        self._writer[places] = np.where(self._writer[places] == COPYING, COPYING, threads[:, None])

    def copy(self, places: Places, data: NDArray[np.uint8], threads: NDArray[np.int32]) -> None:
        """cp.async: begin to store bytes."""
        self._claim(places, threads)
        self._writer[places] = COPYING
        self._open.append((places, data, threads))

    def commit(self) -> None:
        """cp.async.commit_group."""
        self._groups.append(self._open)
        self._open = []

    def wait(self, newest: int) -> None:
        """cp.async.wait_group: all groups but the newest are there, for the thread that copied them."""
        while len(self._groups) > newest:
            for places, data, threads in self._groups.pop(0):
                self.data[places] = data
                self._writer[places] = np.broadcast_to(threads[:, None], places.shape)

    def barrier(self) -> None:
        """bar.sync: everybody sees what was written, and nobody reads any more."""
        self._writer[self._writer >= 0] = EVERYBODY
        self._reader[:] = EVERYBODY

    def warp_barrier(self) -> None:
        """bar.warp.sync: so do the lanes of each warp among themselves."""
        for marks in (self._writer, self._reader):
            one, several = (marks >= 0) & (marks < SEVERAL), (marks >= SEVERAL) & (marks < MET)
            marks[one] = MET + marks[one] // 32
            marks[several] += MET - SEVERAL

    def _mark_read(self, places: Places, own: NDArray[np.int32]) -> None:
        before, warp = self._reader[places], SEVERAL + own // 32
        alike = (before == warp) | (before // 32 == own // 32)
        marks = np.where(_settled(before, own), own, np.where(alike, warp, MANY))
        self._reader[places] = marks
        after = self._reader[places]  # where several threads read one byte now, the mark of one of them
        others, alike = after != marks, ((after == warp) | (after // 32 == own // 32)) & (marks != MANY)
        self._reader[places[others & alike]] = np.broadcast_to(warp, places.shape)[others & alike]
        self._reader[places[others & ~alike]] = MANY

    def _claim(self, places: Places, threads: NDArray[np.int32]) -> None:
        self._inside(places)
        reader = self._reader[places]
        if not _settled(reader, threads[:, None]).all():
            raise Fault("shared memory is overwritten that another thread has read since the last barrier")

    def _inside(self, places: Places) -> None:
        if (places < 0).any() or (places >= self.data.size).any():
            raise Fault(f"an address outside of {self.data.size} bytes of shared memory")


def _settled(marks: NDArray[np.int32], own: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Whether what somebody did to a byte comes before what a thread does now."""
    return (marks == NEVER) | (marks == EVERYBODY) | (marks == own) | (marks == MET + own // 32)


def _bytes(tensor: Tensor) -> NDArray[np.uint8]:
    return tensor.view(-1).view(torch.uint8).numpy()
