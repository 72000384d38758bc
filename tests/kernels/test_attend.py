"""attend: rotation, append and attention in one launch, against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen.kernels import fused, reference
from fastgen.kernels.attend import attend, attend_kernel
from fastgen.kernels.reference import Step
from tests.kernels import support
from tests.kernels.support import compile_ahead, compiled_ahead, in_interpreter, on_gpu

ARGUMENTS = {
    "qkv": "*bf16", "k_cache": "*bf16", "v_cache": "*bf16", "positions": "*i64", "rope": "*fp32", "out": "*bf16",
    "partial": "*fp32", "tickets": "*i32", "eps": "fp32", "scale": "fp32", "window": "i32", "T": "i32", "S": "i32",
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
    {"heads": 4, "kv_heads": 2, "d": 8},
]
TEXTS = [
    ([0], 1), ([1], 1), ([63], 1), ([64], 1), ([700], 1), ([0], 16), ([60], 5), ([1000], 16), ([5, 300, 0], 4),
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
@pytest.mark.parametrize("begin", [0, 57, 130, 900])
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


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
@pytest.mark.parametrize(("d", "group"), [(128, 1), (64, 4)])
def test_compiles_without_a_gpu(d: int, group: int, capability: int, pdl: bool) -> None:
    constants = {
        "q_norm": None, "k_norm": None, "K": 8, "G": group, "D": d, "HALF": d // 2, "ROWS": 16, "TILE": 64,
        "SPLITS": 32, "NORM": False, "PDL": pdl,
    }  # fmt: skip
    compile_ahead(attend_kernel, capability, ARGUMENTS, constants)


@in_interpreter
@pytest.mark.parametrize(("begins", "tokens"), [([64], 1), ([5, 130], 2)])
@pytest.mark.parametrize("shape", CASES[1:4])
def test_agrees_with_the_reference_in_the_interpreter(shape: dict[str, Any], begins: list[int], tokens: int) -> None:
    case = Case(begins, tokens, dtype=torch.float32, device="cpu", capacity=256, **shape)
    exact, k, _ = case.exact()
    actual = attend(*case.arguments())
    assert support.distance(actual, exact) < 1e-5
    for row, begin in enumerate(begins):
        assert support.distance(case.k_cache[row, :, : begin + tokens], k[row, :, : begin + tokens]) < 1e-5
