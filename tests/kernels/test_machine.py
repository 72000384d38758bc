"""The machine that tests run kernels on: it computes what PTX says, and finds what a GPU would leave to chance."""

import numpy as np
import pytest
import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from fastgen.kernels.fragments import arrived, barrier, commit, lanes, load_four, statement, wait_where
from fastgen.kernels.ring import (
    copy_rows,
    load_words,
    release,
    ring_memory,
)
from tests.kernels import ptx
from tests.kernels.machine import OnMachine
from tests.kernels.memory import Fault
from tests.kernels.support import compiled_ahead

pytestmark = compiled_ahead


@gluon.jit
def shift_kernel(x, out, BY: gl.constexpr, EARLY: gl.constexpr):
    """out[i] = x[i + BY] for 64 values, read before or after the wait for the kernel ahead."""
    at = gl.arange(0, 64, gl.BlockedLayout([1], [32], [2], [0]))
    if EARLY:
        value = gl.load(x + at + BY)
        statement("griddepcontrol.wait;")
    else:
        statement("griddepcontrol.wait;")
        value = gl.load(x + at + BY)
    gl.store(out + at, value)


@gluon.jit
def maybe_waiting_kernel(x, out, here, HALF: gl.constexpr):
    """out[i] = x[i], behind a wait that happens if here is not 0, of every second thread if HALF."""
    warp = gl.arange(0, 2, gl.SliceLayout(1, lanes(2)))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes(2)))[None, :] + warp * 0
    wait_where((lane % 2 + (0 if HALF else 1) > 0) & (here != 0))
    gl.store(out + warp * 32 + lane, gl.load(x + warp * 32 + lane))


@gluon.jit
def early_store_kernel(out):
    """Store before the wait."""
    at = gl.arange(0, 64, gl.BlockedLayout([1], [32], [2], [0]))
    gl.store(out + at, at * 1.0)
    statement("griddepcontrol.wait;")


@gluon.jit
def ring_kernel(x, out, COPY: gl.constexpr, WAIT: gl.constexpr, MEET: gl.constexpr, OTHER: gl.constexpr):
    """out[i] = the first word of what lane i ^ OTHER copied: x [1024] fp16, out [64] int32."""
    memory, address = ring_memory(8)
    warp = gl.arange(0, 2, gl.SliceLayout(1, lanes(2)))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, lanes(2)))[None, :] + warp * 0
    if COPY:
        source = x + (warp * 32 + lane) * 8
        size = lane * 0 + 16
        copy_rows(address + warp * 2048 + lane * 16, source, (size, size), 0, 0)
    commit()
    if WAIT:
        arrived(0)
    if MEET:
        barrier()
    words = load_four(address + warp * 2048 + (lane ^ OTHER) * 16, 0)
    gl.store(out + warp * 32 + lane, words[0].to(gl.int32))
    barrier()
    release(memory, 2)


@gluon.jit
def rows_kernel(x, out, STRIDE: gl.constexpr):
    """out[i] = the first word of x[i * STRIDE ..], four words at once: x [1024] fp16."""
    at = (
        gl.arange(0, 2, gl.SliceLayout(1, lanes(2)))[:, None] * 32 + gl.arange(0, 32, gl.SliceLayout(0, lanes(2)))[None]
    )
    gl.store(out + at, load_words(x + at * STRIDE)[0].to(gl.int32))


@gluon.jit
def ticket_kernel(tickets, out):
    """out[i] = the i-th program's ticket."""
    gl.store(out + gl.program_id(0), gl.atomic_add(tickets, 2, sem="acq_rel"))


@gluon.jit
def count_kernel(total):
    """Add 1 in every program, in two steps."""
    gl.store(total, gl.load(total) + 1)


@gluon.jit
def unknown_kernel(out):
    """An instruction that the machine lacks."""
    statement("membar.gl;")
    gl.store(out + gl.arange(0, 64, gl.BlockedLayout([1], [32], [2], [0])), 1.0)


def shifted(by: int, *, early: bool) -> torch.Tensor:
    out = torch.empty(64)
    OnMachine(shift_kernel, ahead=("x",))[(1,)](
        torch.arange(64.0), out, BY=by, EARLY=early, num_warps=2, launch_pdl=True
    )
    return out


def copied(copy: bool, wait: bool, meet: bool, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = torch.arange(1024.0).half(), torch.empty(64, dtype=torch.int32)
    OnMachine(ring_kernel)[(1,)](x, out, COPY=copy, WAIT=wait, MEET=meet, OTHER=other, num_warps=2)
    return x.view(torch.int32)[: 4 * 64 : 4], out


def test_what_the_kernel_ahead_writes_is_read_after_the_wait_alone() -> None:
    assert torch.equal(shifted(0, early=False), torch.arange(64.0))
    with pytest.raises(Fault, match=r"\[64\] is read before griddepcontrol.wait"):
        shifted(0, early=True)
    with pytest.raises(Fault, match="a store before griddepcontrol"):
        OnMachine(early_store_kernel)[(1,)](torch.empty(64), num_warps=2, launch_pdl=True)


def test_an_instruction_that_no_thread_executes_has_no_effect_and_one_that_some_execute_is_refused() -> None:
    def waited(here: int, *, half: bool) -> torch.Tensor:
        x, out = torch.arange(64.0), torch.empty(64)
        machine = OnMachine(maybe_waiting_kernel, ahead=("x",))
        machine[(1,)](x, out, here, HALF=half, num_warps=2, launch_pdl=True)
        return out

    assert torch.equal(waited(2, half=False), torch.arange(64.0))
    with pytest.raises(Fault, match=r"is read before griddepcontrol.wait"):
        waited(0, half=False)
    with pytest.raises(Fault, match="some threads skip it"):
        waited(2, half=True)


def test_memory_outside_of_tensors_is_not_touched() -> None:
    with pytest.raises(Fault, match=r"ld.global.*memory that belongs to no tensor is read"):
        shifted(1, early=False)


def test_addresses_are_aligned() -> None:
    x, out = torch.arange(1024.0).half(), torch.empty(64, dtype=torch.int32)
    OnMachine(rows_kernel)[(1,)](x, out, STRIDE=8, num_warps=2)
    assert torch.equal(out, x.view(torch.int32)[: 4 * 64 : 4])
    with pytest.raises(Fault, match="no multiple of 16"):
        OnMachine(rows_kernel)[(1,)](x, out, STRIDE=4, num_warps=2)


def test_a_copy_is_there_for_its_own_lane_after_the_wait_and_for_others_after_a_barrier() -> None:
    for meet, other in ((False, 0), (True, 3)):
        words, out = copied(True, True, meet, other)
        assert torch.equal(out, words[torch.arange(64) ^ other])
    with pytest.raises(Fault, match="its group was not waited for"):
        copied(True, False, True, 0)
    with pytest.raises(Fault, match="another thread wrote since the last barrier"):
        copied(True, True, False, 3)
    assert copied(False, True, True, 0)[1].eq(-1).all(), "what nobody wrote is NaN"


def test_every_program_takes_a_ticket_of_its_own() -> None:
    tickets, out = torch.zeros(1, dtype=torch.int32), torch.empty(5, dtype=torch.int32)
    OnMachine(ticket_kernel)[(5,)](tickets, out, num_warps=2)
    assert sorted(out.tolist()) == [0, 2, 4, 6, 8] and tickets.item() == 10


def test_programs_run_at_the_same_time_in_an_order_that_changes() -> None:
    kernel, totals = OnMachine(count_kernel), []
    for _ in range(8):
        total = torch.zeros(1, dtype=torch.int32)
        kernel[(3,)](total, num_warps=2)
        totals.append(total.item())
    assert len(set(totals)) > 1, "a sum without atomics hangs on the order"


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(NotImplementedError, match="membar"):
        OnMachine(unknown_kernel)[(1,)](torch.empty(64), num_warps=2)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_rounding_to_16_bits_is_to_the_nearest_ties_to_even(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.cat(
        (torch.randn(4096) * 10.0 ** torch.randint(-9, 6, (4096,)), torch.tensor([0.0, -0.0, torch.inf]))
    )
    expected = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
    assert (ptx.narrowed(values.numpy(), kind) == expected).all()
    half = 2.0 ** (-8 if kind == "bf16" else -11)
    near = np.array([1 + half, 1 + half + 2.0**-40, 1 + half - 2.0**-40, 1 + 3 * half])
    assert ptx.widened(ptx.narrowed(near, kind), kind).tolist() == [1, 1 + 2 * half, 1, 1 + 4 * half]


def test_comparisons_with_a_nan_are_false_unless_they_end_in_u() -> None:
    a, b = np.array([1.0, np.nan, 2.0]), np.array([2.0, 2.0, 2.0])
    for how, expected in (
        ("lt", [1, 0, 0]),
        ("ltu", [1, 1, 0]),
        ("ne", [1, 0, 0]),
        ("neu", [1, 1, 0]),
        ("nan", [0, 1, 0]),
    ):
        assert ptx.compared(how, a, b).tolist() == [bool(e) for e in expected], how


def test_permutations_and_tables_of_bits() -> None:
    a, b = np.array([0x33221180], np.uint32), np.array([0x77665544], np.uint32)
    assert ptx.permuted(a, b, np.array([0x7351], np.uint32))[0] == 0x77335511
    assert ptx.permuted(a, b, np.array([0x8888], np.uint32))[0] == 0xFFFFFFFF, "the sign of byte 0"
    c = np.array([0x0F0F0F0F], np.uint32)
    assert ptx.chosen_bits(a, b, c, 0xEA)[0] == (a & b | c)[0]


def test_fields_of_bits_have_the_sign_of_their_word() -> None:
    word, first, length = (np.array([n], np.uint32) for n in (0x00F50000, 16, 8))
    assert ptx.field(word, first, length)[0] == 0xF5
    assert ptx.field(word.view(np.int32), first, length)[0] == 0xF5 - 256
