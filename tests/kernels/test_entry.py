"""rotations and embed: what a step begins with, against the reference."""

import dataclasses

import pytest
import torch
from torch import nn

from fastgen.config import ModelConfig, RopeScaling
from fastgen.kernels import fused, reference
from fastgen.kernels.entry import embed, embed_kernel, rotations, rotations_kernel
from fastgen.kernels.rope import Rope
from tests.kernels import support
from tests.kernels.support import compile_ahead, compiled_ahead, in_interpreter, on_gpu

CONFIG = ModelConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=96, hidden_dim=64, vocab_size=300, max_seq_len=1 << 17
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_seq_len=4096, beta_fast=32.0, beta_slow=1.0)
DYNAMIC = RopeScaling(kind="dynamic", factor=4.0, original_max_seq_len=4096)
POSITIONS = [[0, 1, 2, 3], [4095, 4096, 70000, 131071]]


def table(width: int, dtype: torch.dtype, device: str) -> nn.Embedding:
    torch.manual_seed(width)
    return nn.Embedding(300, width).to(device, dtype).requires_grad_(False)


@on_gpu
@pytest.mark.parametrize("scaling", [None, YARN, DYNAMIC])
def test_rotations_are_those_of_the_reference(scaling: RopeScaling | None) -> None:
    rope = Rope(dataclasses.replace(CONFIG, rope_scaling=scaling)).to("cuda")
    positions = torch.tensor(POSITIONS, device="cuda")
    lengths = positions[:, -1] + 1
    actual = support.poisoned(fused.rotations, positions, lengths, rope)
    torch.testing.assert_close(actual, reference.rotations(positions, lengths, rope), rtol=0, atol=1e-6)


@on_gpu
@pytest.mark.parametrize("width", [63, 96, 1024, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embed_gives_the_rows_and_row_0_for_no_token(width: int, dtype: torch.dtype) -> None:
    tokens = torch.tensor([[5, 299, 0], [-1, 7, 7]], device="cuda")
    rows = table(width, dtype, "cuda")
    assert torch.equal(support.poisoned(fused.embed, tokens, rows), rows.weight[tokens.clamp(min=0)])


@on_gpu
def test_compile_in_one_graph_and_pass_opcheck() -> None:
    rope, rows = Rope(CONFIG).to("cuda"), table(96, torch.bfloat16, "cuda")
    tokens = torch.tensor([[5, 299]], device="cuda")
    compiled = torch.compile(lambda t: fused.embed(t, rows) * 2, fullgraph=True)
    assert torch.equal(compiled(tokens), fused.embed(tokens, rows) * 2)
    torch.library.opcheck(embed, (tokens, rows.weight, 0))
    torch.library.opcheck(rotations, (tokens, rope.frequencies, 1.0))


@compiled_ahead
@pytest.mark.parametrize(("capability", "pdl"), support.TARGETS)
def test_compile_without_a_gpu_and_embed_lets_nobody_start_early(capability: int, pdl: bool) -> None:
    arguments = {"positions": "*i64", "frequencies": "*fp32", "out": "*fp32", "factor": "fp32"}
    code = compile_ahead(rotations_kernel, capability, arguments, {"HALF": 48, "WIDTH": 64, "PDL": pdl}).asm["ptx"]
    assert ("griddepcontrol.launch_dependents" in code) is pdl
    arguments = {
        "tokens": "*i64", "weight": "*bf16", "out": "*bf16", "first": "i32", "size": "i32", "width": "i32",
    }  # fmt: skip
    code = compile_ahead(embed_kernel, capability, arguments, {"BLOCK": 1024, "PDL": pdl}).asm["ptx"]
    assert "griddepcontrol.launch_dependents" not in code
    assert ("griddepcontrol.wait" in code) is pdl


@in_interpreter
def test_agree_with_the_reference_in_the_interpreter() -> None:
    rope, positions = Rope(CONFIG), torch.tensor([[3, 4], [90, 91]])
    actual = rotations(positions, rope.frequencies, 1.5)
    torch.testing.assert_close(actual, 1.5 * rope(positions), rtol=0, atol=1e-6)
    rows, tokens = table(1100, torch.float32, "cpu"), torch.tensor([[3, -1, 299]])
    assert torch.equal(embed(tokens, rows.weight, 0), reference.embed(tokens, rows))


@in_interpreter
def test_parts_of_an_embedding_read_their_own_rows_alone_in_the_interpreter() -> None:
    """Each part lies between the others in memory, so a row that is not its own would show."""
    rows, tokens = table(1100, torch.float32, "cpu"), torch.tensor([[3, -1, 99, 100, 199, 200, 299]])
    for first in (0, 100, 200):
        part = nn.Embedding.from_pretrained(rows.weight[first : first + 100])
        assert torch.equal(embed(tokens, part.weight, first), reference.embed_part(tokens, part, first)), first
