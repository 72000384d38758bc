"""attend: rotation, append and attention in one launch, against the reference."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.kernels import fused, launch, reference
from fastgen.kernels.attend import REGISTERS, ROWS, SPAN, WARPS, attend, attend_kernel, choose_rows
from fastgen.kernels.reference import Step
from tests.kernels import support
from tests.kernels.support import compiled_ahead, on_gpu

ARGUMENTS = {
    "qkv": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "positions": "*i64", "rope": "*fp32", "q_norm": "*bf16",
    "k_norm": "*bf16", "out": "*bf16", "partial": "*fp32", "tickets": "*i32", "eps": "fp32", "scale": "fp32",
    "window": "i32", "rehearsals": "i32", "T": "i32", "S": "i32",
}  # fmt: skip


class Case:
    """A random cache filled up to where each text stands; behind that it holds NaN."""

    def __init__(
        self, begins: list[int], tokens: int, *, heads: int, kv_heads: int, d: int, dtype: torch.dtype,
        device: str = "cuda", capacity: int = 1024, window: int = 0, normalized: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(sum(begins) + tokens + heads)
        self.tokens, self.begins, self.window, self.d = tokens, begins, window, d
        batch = len(begins)
        self.qkv = torch.randn(batch, tokens, (heads + 2 * kv_heads) * d, device=device).to(dtype)
        shape = (batch, kv_heads, capacity, d)
        self.k_cache = torch.randn(shape, device=device).to(dtype)
        self.v_cache = torch.randn(shape, device=device).to(dtype)
        for row, begin in enumerate(begins):
            self.k_cache[row, :, begin:] = float("nan")
            self.v_cache[row, :, begin:] = float("nan")
        positions = torch.tensor(begins, device=device)[:, None] + torch.arange(tokens, device=device)
        angles = positions[..., None] * 10000 ** -(torch.arange(0, d, 2, device=device) / d)
        rope = torch.cat((angles.cos(), angles.sin()), dim=-1).float()
        self.step = Step(positions, torch.arange(max(begins) + tokens, device=device), rope)
        self.norms = [support.norm(d, dtype=dtype, device=device) if normalized else None for _ in range(2)]

    def options(self) -> dict[str, Any]:
        return {
            "scale": self.d**-0.5, "window": self.window, "q_norm": self.norms[0], "k_norm": self.norms[1],
        }  # fmt: skip

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Output and caches in fp64, with NaN behind the texts made 0, which the mask does not keep from SDPA."""
        k, v = self.k_cache.double().nan_to_num(), self.v_cache.double().nan_to_num()
        options = self.options() | {"q_norm": support.in_fp64(self.norms[0]), "k_norm": support.in_fp64(self.norms[1])}
        step = self.step._replace(rope=self.step.rope.double())
        return reference.attend(self.qkv.double(), k, v, step, **options), k, v

    def torchs(self) -> Tensor:
        k, v = self.k_cache.nan_to_num(), self.v_cache.nan_to_num()
        return reference.attend(self.qkv, k, v, self.step, **self.options())

    def arguments(self) -> tuple[Any, ...]:
        weights = [None if norm is None else norm.weight for norm in self.norms]
        positions, _, rope = self.step
        return (self.qkv, self.k_cache, self.v_cache, positions, rope, *weights, 1e-5, self.d**-0.5, self.window)


CASES = [
    {"heads": 8, "kv_heads": 8, "d": 128},
    {"heads": 8, "kv_heads": 2, "d": 64},
    {"heads": 16, "kv_heads": 2, "d": 128, "normalized": True},
    {"heads": 6, "kv_heads": 2, "d": 96, "window": 50},
    {"heads": 4, "kv_heads": 2, "d": 16},
    {"heads": 4, "kv_heads": 1, "d": 80},
]
TEXTS = [
    ([0], 1), ([1], 1), ([127], 1), ([128], 1), ([700], 1), ([0], 16), ([125], 5), ([1000], 16), ([5, 300, 0], 4),
]  # fmt: skip
"""Where each text stands, and how many tokens it gets."""


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("begins", "tokens"), TEXTS)
@pytest.mark.parametrize("shape", CASES)
def test_error_is_at_most_twice_torchs_and_the_cache_is_appended(
    shape: dict[str, Any], begins: list[int], tokens: int, dtype: torch.dtype
) -> None:
    case = Case(begins, tokens, dtype=dtype, **shape)
    exact, k, v = case.exact()
    theirs = case.torchs()
    actual = support.poisoned(lambda: fused.attend(case.qkv, case.k_cache, case.v_cache, case.step, **case.options()))
    support.assert_as_good_as(actual, theirs, exact, "attend")
    for row, begin in enumerate(begins):
        assert case.k_cache[row, :, begin + tokens :].isnan().all(), "written behind the text"
        for ours, right in ((case.k_cache, k), (case.v_cache, v)):
            assert support.distance(ours[row, :, : begin + tokens], right[row, :, : begin + tokens]) < 4e-3


@on_gpu
@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("begin", [0, 121, 250, 900])
def test_verified_tokens_have_the_bits_of_decoded_ones(shape: dict[str, Any], begin: int) -> None:
    together = Case([begin], 16, dtype=torch.bfloat16, **shape)
    alone = Case([begin], 16, dtype=torch.bfloat16, **shape)
    verified = fused.attend(together.qkv, together.k_cache, together.v_cache, together.step, **together.options())
    for token in range(16):
        one = slice(token, token + 1)
        step = Step(alone.step.positions[:, one], alone.step.key_positions, alone.step.rope[:, one])
        qkv = alone.qkv[:, one]
        decoded = fused.attend(qkv, alone.k_cache, alone.v_cache, step, **alone.options())
        assert torch.equal(decoded, verified[:, one]), f"token {token}"
    assert torch.equal(alone.k_cache.nan_to_num(), together.k_cache.nan_to_num())


@on_gpu
@pytest.mark.parametrize(("window", "normalized"), [(0, True), (2100, False)])
def test_many_shares_of_a_long_text_add_up(window: int, normalized: bool) -> None:
    shape = {"heads": 8, "kv_heads": 2, "d": 128, "capacity": 8192, "window": window, "normalized": normalized}
    case = Case([5000], 3, dtype=torch.bfloat16, **shape)
    exact, theirs = case.exact()[0], case.torchs()
    actual = support.poisoned(lambda: fused.attend(case.qkv, case.k_cache, case.v_cache, case.step, **case.options()))
    support.assert_as_good_as(actual, theirs, exact, "attend")


@on_gpu
def test_compiles_in_one_graph_and_passes_opcheck() -> None:
    case, other = (Case([70], 2, dtype=torch.bfloat16, **CASES[0]) for _ in range(2))
    compiled = torch.compile(
        lambda qkv: fused.attend(qkv, case.k_cache, case.v_cache, case.step, **case.options()) * 2, fullgraph=True
    )
    expected = fused.attend(other.qkv, other.k_cache, other.v_cache, other.step, **other.options()) * 2
    assert torch.equal(compiled(case.qkv), expected)
    case.k_cache.nan_to_num_()
    case.v_cache.nan_to_num_()
    torch.library.opcheck(attend, case.arguments())


@on_gpu
def test_heads_that_are_no_multiple_of_16_go_to_the_reference() -> None:
    case, other = (Case([70], 2, heads=4, kv_heads=2, d=8, dtype=torch.bfloat16) for _ in range(2))
    for one in (case, other):
        one.k_cache.nan_to_num_()
        one.v_cache.nan_to_num_()
    actual = fused.attend(case.qkv, case.k_cache, case.v_cache, case.step, **case.options())
    assert torch.equal(actual, other.torchs())


def compiled(
    d: int, group: int, tokens: int, capability: int, normalized: bool = False, heads: int = 32, splits: int = 8,
    memory: int = 99,
) -> Any:  # fmt: skip
    """The kernel as it would be launched for one text."""
    rows = choose_rows(tokens * group, tokens, d, memory)
    constants = {
        "K": heads // group, "G": group, "D": d, "R": rows, "N": launch.next_power_of_two(tokens), "SPLITS": splits,
        "SPAN": SPAN, "PDL": capability >= 90, "WARPS": WARPS,
    } | ({} if normalized else {"q_norm": None, "k_norm": None})  # fmt: skip
    registers = REGISTERS if capability >= 90 else 255
    return support.compile_ahead(attend_kernel, capability, ARGUMENTS, constants, warps=WARPS, maxnreg=registers)


@compiled_ahead
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("d", "group", "tokens"), [(128, 1, 1), (128, 4, 8), (64, 4, 16)])
def test_the_first_tile_waits_in_registers(d: int, group: int, tokens: int, capability: int) -> None:
    kernel = compiled(d, group, tokens, capability)
    used, code = support.usage(kernel), kernel.asm["ptx"]
    assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilled: {used}"
    loads = [found.start() for found in re.finditer(r"ld\.global\.v4", code)]
    before = code.index("griddepcontrol.wait" if capability >= 90 else "mma.sync")
    chunks = d // 64
    assert sum(load < before for load in loads) >= 8 * chunks, "keys and values, sixteen bytes each"


@compiled_ahead
def test_the_next_kernel_has_room_beside_one_token() -> None:
    kernel = compiled(128, 1, 1, 90)
    assert kernel.metadata.shared <= 8 << 10
    assert support.usage(kernel)["REG"] * 32 * WARPS <= (64 << 10) * 2 // 3


@compiled_ahead
@pytest.mark.parametrize("heads", [1, 96])
def test_it_compiles_for_any_number_of_key_heads(heads: int) -> None:
    splits = launch.split_count(heads)
    assert splits == launch.next_power_of_two(splits)
    assert compiled(64, 1, 1, 90, heads=heads, splits=splits).metadata.shared > 0


@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_least_shared_memory_of_a_gpu_has_room_for_all_rows(d: int) -> None:
    assert choose_rows(64, 16, d, 99) == ROWS


@compiled_ahead
@pytest.mark.parametrize(("memory", "rows"), [(23, 8), (22, 4), (12, 2)])
def test_programs_have_fewer_rows_where_shared_memory_is_short(memory: int, rows: int) -> None:
    assert choose_rows(64, 16, 64, memory) == rows
    assert compiled(64, 4, 16, 90, memory=memory).metadata.shared <= memory << 10


ON_MACHINE = [
    ({"heads": 2, "kv_heads": 1, "d": 128}, [0], 1, torch.bfloat16),
    ({"heads": 8, "kv_heads": 2, "d": 64}, [130], 1, torch.float16),
    ({"heads": 8, "kv_heads": 1, "d": 128, "normalized": True}, [127], 2, torch.bfloat16),
    ({"heads": 2, "kv_heads": 2, "d": 96, "window": 50}, [60], 5, torch.float16),
    ({"heads": 2, "kv_heads": 1, "d": 80}, [5, 300, 0], 4, torch.bfloat16),
    ({"heads": 2, "kv_heads": 1, "d": 48, "window": 300, "normalized": True}, [900], 1, torch.bfloat16),
    ({"heads": 3, "kv_heads": 1, "d": 16}, [1000], 16, torch.bfloat16),
]
"""Shape, where texts stand, their tokens, type: one share or two, which windows leave to the second first."""


@compiled_ahead
@pytest.mark.usefixtures("on_machine")
@pytest.mark.parametrize(("shape", "begins", "tokens", "dtype"), ON_MACHINE)
def test_on_the_machine_it_is_as_good_as_torch_and_appends(
    shape: dict[str, Any], begins: list[int], tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "split_count", lambda kv_heads: 2)
    case = Case(begins, tokens, dtype=dtype, device="cpu", **shape)
    exact, k, v = case.exact()
    theirs = case.torchs()
    support.assert_as_good_as(attend(*case.arguments()), theirs, exact, "attend")
    assert not launch.workspace(torch.device("cpu")).any(), "tickets are given back"
    for row, begin in enumerate(begins):
        for ours, right in ((case.k_cache, k), (case.v_cache, v)):
            assert ours[row, :, begin + tokens :].isnan().all(), "written behind the text"
            assert support.distance(ours[row, :, : begin + tokens], right[row, :, : begin + tokens]) < 4e-3


@compiled_ahead
@pytest.mark.usefixtures("on_machine")
def test_on_the_machine_many_shares_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.kernels.attend.SPAN", 1)
    monkeypatch.setattr(launch, "split_count", lambda kv_heads: 16)
    for begin, window in ((1200, 0), (2200, 1150)):  # shares 0 to 9, then 8 to 15, 0 and 1
        shape = {"heads": 2, "kv_heads": 1, "d": 16, "device": "cpu", "capacity": 2304, "window": window}
        case = Case([begin], 1, dtype=torch.bfloat16, **shape)
        exact, theirs = case.exact()[0], case.torchs()
        support.assert_as_good_as(attend(*case.arguments()), theirs, exact, "attend")


@compiled_ahead
@pytest.mark.usefixtures("on_machine")
def test_on_the_machine_a_row_has_the_same_bits_whoever_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.kernels.attend.SPAN", 1)
    monkeypatch.setattr(launch, "split_count", lambda kv_heads: 4)
    shape = {"heads": 12, "kv_heads": 1, "d": 16, "dtype": torch.bfloat16, "device": "cpu"}
    cases = [Case([500], 2, **shape) for _ in range(3)]  # each in an order of its own
    first, *others = (attend(*case.arguments()) for case in cases)
    assert all(torch.equal(first, other) for other in others)
    assert all(torch.equal(case.k_cache.nan_to_num(), cases[0].k_cache.nan_to_num()) for case in cases)


@compiled_ahead
@pytest.mark.parametrize(("begin", "window", "dependent"), [(249, 0, True), (120, 125, False)])
def test_on_the_machine_a_token_has_the_same_bits_among_others(
    begin: int, window: int, dependent: bool, on_machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "split_count", lambda kv_heads: 2)
    on_machine(launch.DEFAULT[0], dependent=dependent)
    shape = {"heads": 4, "kv_heads": 2, "d": 64, "dtype": torch.bfloat16, "device": "cpu", "window": window}
    together, alone = (Case([begin], 16, **shape) for _ in range(2))
    monkeypatch.setattr(launch, "shared_memory", lambda device: 20 if window else 227)  # which makes it four rows
    verified = attend(*together.arguments())
    at = 0
    for tokens in (1, 3, 1, 5, 6):
        some = slice(at, at + tokens)
        qkv, k_cache, v_cache, positions, rope, *rest = alone.arguments()
        decoded = attend(qkv[:, some].contiguous(), k_cache, v_cache, positions[:, some], rope[:, some], *rest)
        assert torch.equal(decoded, verified[:, some]), f"tokens {at} to {at + tokens}"
        at += tokens
    for ours, theirs in ((alone.k_cache, together.k_cache), (alone.v_cache, together.v_cache)):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
