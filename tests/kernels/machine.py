"""A GPU for tests: what Triton compiles a kernel to, run on the CPU, a few programs at a time.

Triton's interpreter knows neither Gluon nor inline PTX. This machine runs the PTX itself that Triton's compiler makes
for sm_90 or sm_80, with one numpy value a thread and register, on the tensors of a launch:

    monkeypatch.setattr(module, "some_kernel", OnMachine(module.some_kernel, ahead=("x",)))
    module.op(x, weight)        # launches some_kernel[grid](...) as on a GPU

It models registers, predicates, shuffles, mma, memory, tickets and asynchronous copies, which land when they are
waited for and not earlier. Programs that are there together take turns at global memory, in an order that differs from
launch to launch. It raises `Fault` for accesses outside of tensors, addresses that are not aligned, shared memory that
is read before its copy was waited for or without a barrier between writer and reader, and for tensors `ahead` (those
that the kernel before this one writes under programmatic dependent launch) that are read before griddepcontrol.wait.
What nobody wrote to shared memory is NaN. Branches must be taken by all threads of a program alike.

It does not model warps drifting apart otherwise, caches, the order in which global memory becomes visible, or time.

Source: PTX ISA 8.7 (cp.async, ldmatrix, stmatrix, bar.sync, griddepcontrol).
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from tests.kernels import ptx
from tests.kernels.memory import Fault, GlobalMemory, SharedMemory
from tests.kernels.ptx import TYPES, Address, Instruction, Lanes, Operand
from tests.kernels.support import compile_ahead
from tests.kernels.warps import multiplied, reduced, shuffled

SHARED_BASE = 1024
"""The address of Triton's shared memory; nothing lies before it."""

TOGETHER = 4
"""Programs that are there at the same time; when one ends, the next of the grid begins."""

TURNS = (1, 2, 4, 8, 16, 32, 64)
"""How often a program accesses global memory in a turn: programs stay together, or far apart."""

Pairs = tuple[tuple[str, Any], ...]
"""Arguments by name, hashable."""

POINTERS = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32",
    torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip


class OnMachine:
    """Stands in for a kernel of Triton or Gluon: `kernel[grid](...)` runs on this machine."""

    def __init__(self, kernel: Any, ahead: tuple[str, ...] = (), seed: int = 0) -> None:
        """`ahead`: arguments that the kernel before this one writes; `seed`: of the turns, in all launches together."""
        self.kernel, self.ahead, self._order = kernel, ahead, np.random.default_rng(seed)

    def __getitem__(self, grid: tuple[int, ...]) -> functools.partial[None]:
        return functools.partial(self._launch, grid)

    def _launch(
        self, grid: tuple[int, ...], *positional: Any, num_warps: int = 4, launch_pdl: bool = False, **named: Any
    ) -> None:
        assert num_warps <= 32, "a program has 1,024 threads at most"
        values = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
        constants, kinds = _specialized(self.kernel, values)
        compiled = _compiled(self.kernel, 90 if launch_pdl else 80, kinds, constants, num_warps)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        memory = GlobalMemory(tensors.values(), (tensors[name] for name in self.ahead if name in tensors))
        arguments = [_passed(values[name], memory) for name, _ in kinds]
        program = _parsed(compiled.asm["ptx"])

        def begin(place: tuple[int, ...]) -> Iterator[bool]:
            shared = SharedMemory(compiled.metadata.shared)
            return Threads(program, 32 * num_warps, memory, shared, arguments, place, grid, early=launch_pdl).steps()

        take_turns(map(begin, np.ndindex(grid)), self._order)
        memory.give_back()


def take_turns(programs: Iterator[Iterator[bool]], order: np.random.Generator) -> None:
    """Run programs to their ends, the first few of those that have not ended, by turns of a few steps."""
    running = list(itertools.islice(programs, TOGETHER))
    while running:
        turn = order.integers(len(running))
        for _ in range(order.choice(TURNS)):
            if not next(running[turn], False):
                running[turn : turn + 1] = itertools.islice(programs, 1)
                break


def _specialized(kernel: Any, values: Mapping[str, Any]) -> tuple[Pairs, Pairs]:
    """Return what Triton makes constants of (an int that is 1 too, unless told not to), and the others' types."""
    constants: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    for parameter in kernel.params:
        value = values[parameter.name]
        one = type(value) is int and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            constants[parameter.name] = value
        else:
            plain = "i32" if isinstance(value, int) else "fp32"
            kinds[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else plain
    return tuple(constants.items()), tuple(kinds.items())


@functools.cache
def _compiled(
    kernel: Any, capability: int, kinds: Pairs, constants: Pairs, warps: int
) -> triton.compiler.CompiledKernel:
    return compile_ahead(kernel, capability, dict(kinds), dict(constants), warps=warps)


_parsed = functools.cache(ptx.parse)


def _passed(value: Any, memory: GlobalMemory) -> int:
    """Return an argument as the bits that a kernel gets."""
    if isinstance(value, Tensor):
        return memory.address(value)
    return int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value & 0xFFFFFFFF


class Threads:
    """The threads of one program, all at the same instruction."""

    def __init__(
        self, program: ptx.Program, count: int, memory: GlobalMemory, shared: SharedMemory, arguments: list[int],
        place: tuple[int, ...], grid: tuple[int, ...], early: bool,
    ) -> None:  # fmt: skip
        """`arguments`: the bits of the first parameters; `place`: the program's, in the grid; `early`: it may wait."""
        self._program, self._count, self._memory, self._shared, self._early = program, count, memory, shared, early
        self._parameters = dict.fromkeys(program.parameters, 0) | dict(zip(program.parameters, arguments, strict=False))
        self._all = np.arange(count, dtype=np.int32)
        self._everyone = np.ones(count, bool)
        special: dict[str, Any] = {"%tid.x": self._all, "global_smem": SHARED_BASE}
        for axis, at, size in zip("xyz", place, grid, strict=False):
            special |= {f"%ctaid.{axis}": at, f"%nctaid.{axis}": size}
        self._special = {name: np.broadcast_to(np.uint32(value), count) for name, value in special.items()}
        self._registers: dict[str, Lanes] = {
            name: np.full(count, -1, f"i{dtype.itemsize}").view(dtype) if dtype.kind != "b" else np.zeros(count, bool)
            for name, dtype in program.registers.items()
        }

    def steps(self) -> Iterator[bool]:
        """Run to the end, and yield True before each access of global memory; a `Fault` names the instruction."""
        at, code = 0, self._program.code
        while code[at].names[0] != "ret":
            if "global" in code[at].names:
                yield True
            try:
                target = self._step(code[at])
            except (Fault, KeyError, IndexError) as fault:
                raise Fault(f"{code[at].text}: {fault}") from fault
            at = at + 1 if target is None else self._program.labels[target]

    def _step(self, instruction: Instruction) -> str | None:
        """Execute one instruction; return the label that a branch goes to."""
        mask = self._everyone
        if instruction.guard:
            guard = self._registers[instruction.guard] != instruction.negated
            mask = self._everyone if guard.all() else guard
        name = instruction.names[0]
        if name == "bra":
            if mask.any() and mask is not self._everyone:
                raise Fault("threads of a program take different ways")
            return str(instruction.operands[0]) if mask is self._everyone else None
        if not mask.any():  # what nobody executes asks nothing of anybody
            return None
        if name in ("bar", "griddepcontrol") or instruction.names[:2] == ("cp", "async"):
            self._asynchronous(instruction, mask)
        elif name in ("ld", "st"):
            self._access(instruction, mask)
        elif name == "atom":
            self._atomic(instruction, mask)
        elif name in ("mma", "shfl", "redux", "ldmatrix", "stmatrix"):
            if mask is not self._everyone:
                raise Fault("an instruction of whole warps that some threads skip")
            getattr(self, f"_{name}")(instruction)
        elif name == "mov":
            self._move(instruction, mask)
        else:
            value, kind = ptx.computed(instruction, self._read)
            self._write(instruction.operands[0], value, mask, kind)
        return None

    def _read(self, operand: Operand, kind: str) -> Lanes:
        """Return an operand in a type: a register's low bits, a literal, a symbol."""
        dtype = TYPES[kind]
        if isinstance(operand, Address):
            offset = np.uint64(operand.offset & 0xFFFFFFFFFFFFFFFF)
            return (self._read(operand.base, "b64").astype(np.uint64) + offset).astype(dtype)
        assert isinstance(operand, str), f"one operand, not {operand}"
        found = self._registers.get(operand, self._special.get(operand))
        if found is None:
            return ptx.constant(operand, dtype, self._count)
        if found.dtype.itemsize != dtype.itemsize:
            found = found.astype(f"u{dtype.itemsize}")
        return found.view(dtype)

    def _write(self, name: Operand, value: Lanes, mask: NDArray[np.bool_], kind: str) -> None:
        """Put a value of a type into a register, which may be wider."""
        if name == "_":
            return
        old = self._registers[str(name)]
        if old.dtype.kind != "b":
            value = np.ascontiguousarray(value).view(TYPES[kind])
            if value.dtype.itemsize != old.dtype.itemsize:
                value = value.astype(f"{'i' if kind[0] == 's' else 'u'}{old.dtype.itemsize}")
            value = value.view(old.dtype)
        self._registers[str(name)] = value if mask is self._everyone else np.where(mask, value, old)

    def _move(self, instruction: Instruction, mask: NDArray[np.bool_]) -> None:
        """mov: plain, or between a register and its parts."""
        to, source = instruction.operands
        kind = instruction.kind
        if isinstance(to, tuple):
            parts = self._read(source, kind).view(f"u{TYPES[kind].itemsize // len(to)}").reshape(-1, len(to))
            for n, name in enumerate(to):
                self._write(name, parts[:, n], mask, f"b{8 * parts.itemsize}")
        elif isinstance(source, tuple):
            part = f"b{8 * TYPES[kind].itemsize // len(source)}"
            whole = np.stack([self._read(name, part) for name in source], axis=1)
            self._write(to, whole.view(TYPES[kind])[:, 0], mask, kind)
        else:
            self._write(to, self._read(source, kind), mask, kind)

    def _access(self, instruction: Instruction, mask: NDArray[np.bool_]) -> None:
        """ld and st."""
        names, kind = instruction.names, instruction.kind
        load = names[0] == "ld"
        outer, address = instruction.operands if load else reversed(instruction.operands)
        assert isinstance(address, Address), instruction.text
        if "param" in names:
            value = np.full(self._count, self._parameters[address.base], np.uint64)
            self._write(outer, value.astype(TYPES[kind]), mask, kind)
            return
        registers, size = outer if isinstance(outer, tuple) else (outer,), TYPES[kind].itemsize
        places, threads = self._places(address, size * len(registers), mask, "shared" in names), self._all[mask]
        if load:
            data = self._shared.read(places, threads) if "shared" in names else self._memory.read(places, self._early)
            values = np.zeros((self._count, len(registers)), TYPES[kind])
            values[mask] = np.ascontiguousarray(data).view(TYPES[kind])
            for n, name in enumerate(registers):
                self._write(name, values[:, n], mask, kind)
            return
        values = np.stack([self._read(name, kind) for name in registers], axis=1)
        data = np.ascontiguousarray(values[mask]).view(np.uint8)
        if "shared" in names:
            self._shared.write(places, data, threads)
        else:
            self._memory.write(places, data, self._early)

    def _atomic(self, instruction: Instruction, mask: NDArray[np.bool_]) -> None:
        """atom.add: one thread after the other."""
        to, address, value = instruction.operands
        if not {"global", "add"}.issubset(instruction.names) or instruction.kind not in ("u32", "s32"):
            raise ptx.unknown(instruction)
        places, added, old = self._places(address, 4, mask, shared=False), self._read(value, "u32")[mask], []
        for place, more in zip(places, added, strict=True):
            found = self._memory.read(place[None], self._early).view(np.uint32)
            old.append(found.item())
            self._memory.write(place[None], (found + more).view(np.uint8).reshape(1, 4), self._early)
        result = self._read(to, "u32").copy()
        result[mask] = old
        self._write(to, result, mask, "u32")

    def _places(self, address: Operand, size: int, mask: NDArray[np.bool_], shared: bool) -> NDArray[np.int64]:
        """Return the bytes that threads of a mask touch, [threads, size]."""
        first = self._read(address, "u32" if shared else "u64")[mask].astype(np.int64) - (SHARED_BASE if shared else 0)
        if (first % size).any():
            raise Fault(f"an address that is no multiple of {size}")
        return first[:, None] + np.arange(size)

    def _asynchronous(self, instruction: Instruction, mask: NDArray[np.bool_]) -> None:
        """Copies, barriers, and the wait for the kernel ahead."""
        names = instruction.names
        if mask is not self._everyone and "global" not in names:
            raise Fault("some threads skip it")
        if "commit_group" in names:
            self._shared.commit()
        elif "wait_group" in names:
            self._shared.wait(int(str(instruction.operands[0]), 0))
        elif names[:2] == ("bar", "sync") and instruction.operands == ("0",):
            self._shared.barrier()
        elif names[:3] == ("bar", "warp", "sync") and (self._read(instruction.operands[0], "s32") == -1).all():
            self._shared.warp_barrier()
        elif "wait" in names:
            self._early = False
        elif "global" in names:
            to, source, size = instruction.operands[:3]
            self._copy(to, source, int(str(size), 0), instruction.operands[3:], mask)
        elif "launch_dependents" not in names:
            raise ptx.unknown(instruction)

    def _copy(
        self, to: Operand, source: Operand, size: int, rest: tuple[Operand, ...], mask: NDArray[np.bool_]
    ) -> None:
        """cp.async: fewer bytes than the size leave zeros behind them."""
        here = self._read(rest[0], "u32") if rest else np.full(self._count, size, np.uint32)
        if ((here != 0) & (here != size) & mask).any():
            raise Fault("a copy of a part")
        data, real = np.zeros((self._count, size), np.uint8), mask & (here > 0)
        data[real] = self._memory.read(self._places(source, size, real, shared=False), self._early)
        self._shared.copy(self._places(to, size, mask, shared=True), data[mask], self._all[mask])

    def _shfl(self, instruction: Instruction) -> None:
        to, source, other, clamp, _ = instruction.operands
        how = instruction.names[2]
        if how not in ("bfly", "idx") or not (self._read(clamp, "u32") == 31).all():
            raise ptx.unknown(instruction)
        self._write(to, shuffled(how, self._read(source, "b32"), self._read(other, "u32")), self._everyone, "b32")

    def _redux(self, instruction: Instruction) -> None:
        to, source, mask = instruction.operands
        value = reduced(instruction.names[2], self._read(source, instruction.kind), self._read(mask, "u32"))
        self._write(to, value, self._everyone, instruction.kind)

    def _mma(self, instruction: Instruction) -> None:
        shape, kinds = instruction.names[3], instruction.names[6:]
        depths = {("f32", "f32"): ("m16n8k16",), ("s32", "s32"): ("m16n8k16", "m16n8k32")}
        if shape not in depths.get((kinds[0], kinds[3]), ()):
            raise ptx.unknown(instruction)
        to, *sources = instruction.operands
        a, b, c = ([self._read(name, t) for name in s] for s, t in zip(sources, ("b32", "b32", kinds[0]), strict=True))
        for name, value in zip(to, multiplied(kinds, a, b, c), strict=True):
            self._write(name, value, self._everyone, kinds[0])

    def _ldmatrix(self, instruction: Instruction) -> None:
        registers, address = instruction.operands
        for name, (places, threads) in zip(registers, self._matrices(address), strict=False):
            rows = self._shared.read(places, threads).view(np.uint16).reshape(-1, 8, 8)
            rows = np.ascontiguousarray(rows.swapaxes(1, 2) if "trans" in instruction.names else rows)
            self._write(name, rows.view(np.uint32).reshape(-1), self._everyone, "b32")

    def _stmatrix(self, instruction: Instruction) -> None:
        address, registers = instruction.operands
        for name, (places, threads) in zip(registers, self._matrices(address), strict=False):
            rows = np.ascontiguousarray(self._read(name, "b32")).view(np.uint16).reshape(-1, 8, 8)
            rows = np.ascontiguousarray(rows.swapaxes(1, 2) if "trans" in instruction.names else rows)
            self._shared.write(places, rows.view(np.uint8).reshape(places.shape), threads)

    def _matrices(self, address: Operand) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int32]]]:
        """Yield each matrix's rows of 16 bytes, eight a warp, and the threads that name them."""
        first = self._read(address, "u32").astype(np.int64).reshape(-1, 32) - SHARED_BASE
        for lanes in range(0, 32, 8):
            rows = first[:, lanes : lanes + 8].reshape(-1)
            if (rows % 16).any():
                raise Fault("an address that is no multiple of 16")
            yield rows[:, None] + np.arange(16), self._all.reshape(-1, 32)[:, lanes : lanes + 8].reshape(-1)
