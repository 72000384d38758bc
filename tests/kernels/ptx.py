"""PTX as a program: its text in instructions, and what those compute that touch nothing but registers.

A register is an array with one value for each thread. Instructions are looked up by the first part of their name; one
that is not here, or in `machine`, is an error that names it. Results are those of exact arithmetic, rounded once:
what GPUs approximate (ex2, rsqrt, the sums inside of mma) differs there in the last digits.

Source: PTX ISA 8.7, https://docs.nvidia.com/cuda/parallel-thread-execution/ (its section names the instruction).
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.generic]
"""One value for each thread."""

CODES = {
    "pred": "?", "b8": "u1", "b16": "u2", "b32": "u4", "b64": "u8", "u8": "u1", "u16": "u2", "u32": "u4", "u64": "u8",
    "s8": "i1", "s16": "i2", "s32": "i4", "s64": "i8", "f16": "f2", "f32": "f4", "f64": "f8", "bf16": "u2",
}  # fmt: skip
TYPES = {name: np.dtype(code) for name, code in CODES.items()}
"""How numpy holds a type; those that it lacks are held as bits."""


class Address(NamedTuple):
    """[base + offset]; base is a register, a parameter or a symbol."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address


class Instruction(NamedTuple):
    """One instruction: `@guard name.name.name operand, operand`."""

    text: str
    guard: str
    negated: bool
    names: tuple[str, ...]
    operands: tuple[Operand, ...]

    @property
    def kind(self) -> str:
        """The type that the operation is done in."""
        return self.names[-1]


class Program(NamedTuple):
    """A kernel: the names of its parameters, its instructions, where labels stand, and the types of registers."""

    parameters: list[str]
    code: list[Instruction]
    labels: dict[str, int]
    registers: dict[str, np.dtype]


def parse(text: str) -> Program:
    """Return the one kernel of a PTX module."""
    head, _, body = re.sub(r"//[^\n]*", "", text[text.index(".entry") :]).partition("{")
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, np.dtype] = {}
    local: dict[str, str] = {}
    for line in _without_places(body).split(";"):
        statement = line.strip()
        while found := re.match(r"(\$\w+):\s*|}\s*|{\s*(?=[.@a-z])", statement):  # labels, and ends of blocks
            labels |= {found.group(1): len(code)} if found.group(1) else {}
            statement = statement[found.end() :]
        if statement.startswith(".reg"):
            for name, dtype in _declared(statement).items():
                if not name.startswith("%"):  # of a block of inline assembly: another block may have its own
                    local[name] = f"{name}.{len(code)}"
                registers[local.get(name, name)] = dtype
        elif statement and not statement.startswith("."):
            code.append(_instruction(" ".join(statement.split()), local))
    return Program(re.findall(r"(\w+_param_\d+)", head), code, labels, registers)


def _without_places(body: str) -> str:
    """Drop what serves debuggers: places in the source, and sections behind the kernel."""
    end = re.search(r"^}", body, re.MULTILINE)
    return re.sub(r"^\s*\.loc[^\n]*$", "", body[: end.start() if end else None], flags=re.MULTILINE)


def _declared(statement: str) -> dict[str, np.dtype]:
    found = re.match(r"\.reg \.(\w+)\s+(.+)", statement)
    assert found, f"a declaration of registers: {statement}"
    dtype, result = TYPES[found.group(1).replace("f", "b")], {}
    for name in found.group(2).split(","):
        base, _, count = name.strip().rstrip(">").partition("<")
        result |= {f"{base}{n}": dtype for n in range(int(count))} if count else {base: dtype}
    return result


def _instruction(text: str, local: dict[str, str]) -> Instruction:
    guard, rest = "", text
    if text.startswith("@"):
        guard, _, rest = text[1:].partition(" ")
    name, _, operands = rest.partition(" ")
    parts = re.findall(r"\{[^}]*}|\[[^\]]*]|[^,\s]+", operands)
    names = tuple(part for part in re.split(r"[.:]+", name) if part)
    negated, guard = guard.startswith("!"), guard.lstrip("!")
    found = tuple(_operand(part, local) for part in parts)
    return Instruction(text, local.get(guard, guard), negated, names, found)


def _operand(text: str, local: dict[str, str]) -> Operand:
    if text.startswith("{"):
        names = (name.strip() for name in text[1:-1].split(","))
        return tuple(local.get(name, name) for name in names)
    if text.startswith("["):
        base, _, offset = (part.strip() for part in text[1:-1].partition("+"))
        return Address(local.get(base, base), int(offset or 0))
    return local.get(text, text)


def unknown(instruction: Instruction) -> NotImplementedError:
    """Return the error for an instruction that nothing here models."""
    return NotImplementedError(f"an instruction that the machine does not know: {instruction.text}")


@functools.cache
def constant(text: str, dtype: np.dtype, threads: int) -> Lanes:
    """Return a literal, such as -1, 0x1f or 0f3F800000 (the bits of a float), in every thread."""
    bits = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return np.full(threads, bits != 0)
    return np.full(threads, bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def widened(bits: Lanes, kind: str) -> NDArray[np.float32]:
    """Return 16-bit floats, given as bits, as fp32."""
    bits = bits.astype(np.uint16)
    return (bits.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else bits.view(np.float16).astype("f4")


@np.errstate(all="ignore")
def narrowed(value: Lanes, kind: str) -> NDArray[np.uint16]:
    """Return fp32 or fp64 as the bits of 16-bit floats, rounded once, to the nearest, ties to even."""
    if kind == "f16":
        return value.astype(np.float16).view(np.uint16)
    near = value.astype(np.float32)
    bits, wrong = near.view(np.uint32), (near != value) & ~np.isnan(value)
    bits = bits - (np.abs(near) > np.abs(value)) | wrong  # towards zero, then odd: a tie can't come from this rounding
    bits = bits.astype(np.uint64)
    rounded = bits + 0x7FFF + (bits >> 16 & 1) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def halves(words: Lanes, kind: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the low and the high of two 16-bit floats in 32 bits."""
    return widened(words & 0xFFFF, kind), widened(words >> 16, kind)


def converted(value: Lanes, to: str, of: str) -> Lanes:
    """cvt from type `of` to type `to`; integers wrap, which is what cvt does without .sat."""
    if of == "bf16":
        value = widened(value, of)
    if to == "bf16":
        return narrowed(value, to)
    assert not (value.dtype.kind == "f" and to[0] in "us"), "floats to integers are not modelled"
    return value.astype(TYPES[to])


def compared(how: str, a: Lanes, b: Lanes) -> Lanes:
    """setp: with a NaN everything is false, what ends in u is true."""
    nan = np.isnan(a) | np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    if how in ("nan", "num"):
        return nan if how == "nan" else ~nan
    unordered = len(how) == 3
    test = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    result = test[how[:2]](a, b)
    return result | nan if unordered else result & ~nan


def shifted(left: bool, value: Lanes, amount: Lanes) -> Lanes:
    """shl, shr: amounts beyond the width leave nothing, or the sign."""
    width = 8 * value.itemsize
    inside = np.minimum(amount, width - 1).astype(value.dtype)
    result = value << inside if left else value >> inside
    emptied = np.zeros_like(value) if left or value.dtype.kind == "u" else result
    return np.where(amount < width, result, emptied)


def divided(a: Lanes, b: Lanes) -> Lanes:
    """div: integers towards zero."""
    if a.dtype.kind == "f":
        return a / b
    return (np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64)) * np.sign(a) * np.sign(b)).astype(a.dtype)


def fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """fma: one rounding."""
    if a.dtype == np.float64:
        return a * b + c
    return (a.astype(np.float64) * b + c).astype(np.float32)


def permuted(a: Lanes, b: Lanes, selectors: Lanes) -> Lanes:
    """prmt: each byte of the result is one of eight, or its sign."""
    both, result = b.astype(np.uint64) << 32 | a, np.zeros(a.shape, np.uint64)
    for n in range(4):
        selector = (selectors >> 4 * n & 15).astype(np.uint64)
        byte = both >> (selector & 7) * 8 & 255
        result |= np.where(selector & 8, (byte >> 7) * 255, byte) << 8 * n
    return result.astype(np.uint32)


def funnel(left: bool, low: Lanes, high: Lanes, amount: Lanes) -> Lanes:
    """shf.wrap: a shift of 64 bits."""
    both, by = high.astype(np.uint64) << 32 | low, (amount & 31).astype(np.uint64)
    return ((both << by) >> 32 if left else both >> by).astype(np.uint32)


def field(value: Lanes, first: Lanes, length: Lanes) -> Lanes:
    """bfe: some bits of a word, of a signed one with their sign; those beyond the word are its sign."""
    first, length = (n.astype(np.int64) & 255 for n in (first, length))
    bits = value.astype(np.int64) >> np.minimum(first, 63) & (np.int64(1) << np.minimum(length, 62)) - 1
    if value.dtype.kind == "i":
        bits -= (bits >> np.maximum(length, 1) - 1 & 1) << np.minimum(length, 62)
    return bits.astype(value.dtype)


def chosen_bits(a: Lanes, b: Lanes, c: Lanes, table: int) -> Lanes:
    """lop3: bit 4a + 2b + c of the table."""
    result = np.zeros_like(a)
    for n in range(8):
        if table >> n & 1:
            result |= (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return result


OPERATIONS: dict[str, Callable[..., Lanes]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "mad": lambda a, b, c: a * b + c, "fma": fused,
    "div": divided, "rem": np.fmod, "neg": np.negative, "abs": np.abs, "min": np.fmin, "max": np.fmax,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "prmt": permuted,
    "ex2": np.exp2, "rsqrt": lambda a: (1 / np.sqrt(a.astype(np.float64))).astype(a.dtype),
}  # fmt: skip
"""What takes all its operands in the type that the name ends with, and gives that."""


MODIFIERS = {*CODES, "bf16x2", "f16x2", "rn", "ftz", "approx", "full", "lo", "hi", "wide", "wrap", "l", "r"} | {
    order + unordered for order in ("eq", "ne", "lt", "le", "gt", "ge") for unordered in ("", "u")
} | {"nan", "num"}  # fmt: skip
"""What may stand in the middle of a name; ftz is ignored, as no result here depends on subnormal numbers."""


@np.errstate(all="ignore")
def computed(instruction: Instruction, read: Callable[[Operand, str], Lanes]) -> tuple[Lanes, str]:
    """Return what an instruction writes to its first operand, given how to read the others in a type; and its type."""
    name, kind = instruction.names[0], instruction.kind
    if not MODIFIERS.issuperset(instruction.names[1:-1]):
        raise unknown(instruction)
    sources = instruction.operands[1:]
    if kind in ("bf16x2", "f16x2"):
        return _paired(OPERATIONS[name], kind.removesuffix("x2"), [read(s, "b32") for s in sources]), "b32"
    if name == "cvt":
        to = instruction.names[-2]
        if to.endswith("x2"):
            high, low = (narrowed(read(s, kind), to.removesuffix("x2")).astype(np.uint32) for s in sources)
            return high << 16 | low, "b32"
        return converted(read(sources[0], kind), to, kind), to
    if name == "setp":
        return compared(instruction.names[1], read(sources[0], kind), read(sources[1], kind)), "pred"
    if name == "selp":
        return np.where(read(sources[2], "pred"), read(sources[0], kind), read(sources[1], kind)), kind
    if name in ("shl", "shr"):
        return shifted(name == "shl", read(sources[0], kind.replace("b", "u")), read(sources[1], "u32")), kind
    if name in ("shf", "bfe", "dp4a", "lop3"):
        return _of_bits(instruction, read), kind
    if instruction.names[1] in ("wide", "hi"):
        wide = f"{kind[0]}{2 * int(kind[1:])}"
        product = read(sources[0], kind).astype(TYPES[wide]) * read(sources[1], kind).astype(TYPES[wide])
        if instruction.names[1] == "hi":
            return (product >> int(kind[1:])).astype(TYPES[kind]), kind
        return product + read(sources[2], wide) if name == "mad" else product, wide
    if name not in OPERATIONS:
        raise unknown(instruction)
    return OPERATIONS[name](*(read(s, kind.replace("b", "u")) for s in sources)), kind


def _of_bits(instruction: Instruction, read: Callable[[Operand, str], Lanes]) -> Lanes:
    """What takes its operands in several types."""
    name, kind, sources = instruction.names[0], instruction.kind, instruction.operands[1:]
    if name == "shf":
        assert instruction.names[2] == "wrap", instruction.text
        return funnel(instruction.names[1] == "l", *(read(s, "u32") for s in sources))
    if name == "bfe":
        return field(read(sources[0], kind), read(sources[1], "u32"), read(sources[2], "u32"))
    if name == "dp4a":
        a, b = (_bytes(read(s, "b32"), sign) for s, sign in zip(sources, instruction.names[1:], strict=False))
        return read(sources[2], kind) + (a * b).sum(1, dtype=np.int32)
    return chosen_bits(*(read(s, "b32") for s in sources[:3]), int(str(sources[3]), 0))


def _bytes(words: Lanes, kind: str) -> NDArray[np.int32]:
    whole = np.ascontiguousarray(words)[:, None]
    return whole.view(np.int8 if kind[0] == "s" else np.uint8).astype(np.int32)


def _paired(operation: Callable[..., Lanes], kind: str, words: list[Lanes]) -> Lanes:
    """Do to two 16-bit floats in a word what is done to one, in fp64."""
    low, high = (
        narrowed(operation(*(value.astype(np.float64) for value in values)), kind).astype(np.uint32)
        for values in zip(*(halves(word, kind) for word in words), strict=True)
    )
    return low | high << 16
