"""RoPE's frequencies and rotation against an fp64 loop and against transformers."""

import cmath
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from fastgen.config import ModelConfig, RopeScaling
from fastgen.kernels.rope import Rope, apply_rope, inverse_frequencies

PLAIN = ModelConfig(
    dim=64, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, vocab_size=97, max_seq_len=64,
    rope_theta=10000.0,
)  # fmt: skip

YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "yarn": YARN,
    "yarn-mscale": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-mscale-alone": YARN | {"mscale": 0.7},
    "yarn-untruncated": YARN | {"truncate": False},
    "yarn-attention-factor": YARN | {"attention_factor": 1.25},
    "yarn-betas": YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 48},
}
PUBLISHED = {
    "Llama 3.1": (500000.0, 131072, LLAMA3 | {"original_max_position_embeddings": 8192}),
    "Qwen2.5": (1000000.0, 32768, YARN | {"factor": 4.0, "original_max_position_embeddings": 32768}),
}


def ours(parameters: dict[str, object], config: ModelConfig = PLAIN) -> ModelConfig:
    """Translated here by hand: reading config.json has tests of its own."""
    fields = dict(parameters)
    if (kind := fields.pop("rope_type")) == "default":
        return config
    original = fields.pop("original_max_position_embeddings", config.max_seq_len)
    return replace(config, rope_scaling=RopeScaling(kind=kind, original_max_seq_len=original, **fields))


def theirs(parameters: dict[str, object], config: ModelConfig = PLAIN) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=config.dim,
            num_attention_heads=config.n_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_seq_len,
            rope_parameters={"rope_theta": config.rope_theta, **parameters},
        )
    )


def rotate_fp64(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """RoFormer's rotation, one complex number at a time: pair (j, j + d/2) turns by p * theta^(-2j/d)."""
    out = torch.empty(x.shape, dtype=torch.float64)
    B, T, H, d = x.shape
    for b in range(B):
        for t in range(T):
            for h in range(H):
                for j in range(d // 2):
                    pair = complex(x[b, t, h, j], x[b, t, h, j + d // 2])
                    turned = pair * cmath.exp(1j * int(positions[b, t]) * theta ** (-2 * j / d))
                    out[b, t, h, j], out[b, t, h, j + d // 2] = turned.real, turned.imag
    return out


@pytest.mark.parametrize(("tokens", "heads"), [(5, 3), (3, 5), (1, 4), (4, 1)])
def test_rotation_equals_an_fp64_loop_over_tokens_and_heads(tokens: int, heads: int) -> None:
    """Tokens and heads differ in number: rotating by the head's index in place of the position fails."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, heads, PLAIN.head_dim, generator=generator)
    positions = torch.randint(0, 50, (2, tokens), generator=generator)
    got = apply_rope(x, Rope(PLAIN)(positions))
    torch.testing.assert_close(got.double(), rotate_fp64(x, positions, PLAIN.rope_theta), atol=2e-5, rtol=0)


def test_rotation_is_computed_in_fp32_and_returned_in_the_inputs_dtype() -> None:
    x = torch.randn(1, 4, 3, PLAIN.head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    rows = Rope(PLAIN)(torch.arange(40, 44)[None])
    got = apply_rope(x, rows)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, apply_rope(x.float(), rows).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [40, 64, 65, 200])  # below, at and above max_position_embeddings
def test_rows_and_rotation_equal_transformers_for_every_scaling_kind(kind: str, length: int) -> None:
    positions = torch.arange(length).expand(2, -1)
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(2, length, 4, PLAIN.head_dim, generator=generator)
    k = torch.randn(2, length, 2, PLAIN.head_dim, generator=generator)
    rows = Rope(ours(KINDS[kind]))(positions)
    cos, sin = theirs(KINDS[kind])(q, positions)
    half = PLAIN.head_dim // 2
    torch.testing.assert_close(rows, torch.cat((cos[..., :half], sin[..., :half]), dim=-1), atol=1e-6, rtol=0)
    want_q, want_k = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    torch.testing.assert_close(apply_rope(q, rows), want_q, atol=1e-5, rtol=0)
    torch.testing.assert_close(apply_rope(k, rows), want_k, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_have_the_very_bits_of_transformers(kind: str) -> None:
    """At position 100,000 a frequency's last bit is a hundredth of a radian."""
    frequencies, attention_factor = inverse_frequencies(ours(KINDS[kind]))
    rope = theirs(KINDS[kind])
    assert torch.equal(frequencies, rope.inv_freq)
    assert attention_factor == rope.attention_scaling


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_long_context_models_have_the_very_bits_of_transformers(name: str) -> None:
    theta, max_seq_len, parameters = PUBLISHED[name]
    config = replace(PLAIN, head_dim=128, max_seq_len=max_seq_len, rope_theta=theta)
    got, attention_factor = inverse_frequencies(ours(parameters, config))
    rope = theirs(parameters, config)
    assert torch.equal(got, rope.inv_freq)
    assert attention_factor == rope.attention_scaling


def test_dynamic_frequencies_follow_each_texts_own_length() -> None:
    rope = Rope(ours(KINDS["dynamic"]))
    positions = torch.arange(10).expand(3, -1)
    rows = rope(positions, torch.tensor([10, 64, 300]))
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[1], rows[2])
    alone, _ = inverse_frequencies(ours(KINDS["dynamic"]), length=300)
    assert torch.equal(rows[2, :, 8:], (positions[2, :, None].float() * alone).sin())


def test_a_chunked_prompt_turns_like_one_in_one_piece() -> None:
    rope = Rope(ours(KINDS["dynamic"]))
    positions = torch.arange(100)[None]
    chunks = [rope(chunk, torch.tensor([100])) for chunk in positions.split(32, dim=1)]
    assert torch.equal(torch.cat(chunks, dim=1), rope(positions))


def test_dynamic_length_is_part_of_the_graph() -> None:
    """One graph, without a host sync or a branch on the value, serves short and stretched texts."""
    rope = Rope(ours(KINDS["dynamic"]))
    compiled = torch.compile(rope, fullgraph=True, backend="eager")
    positions = torch.arange(8)[None]
    for length in (8, 64, 65, 500):
        lengths = torch.tensor([length])
        assert torch.equal(compiled(positions, lengths), rope(positions, lengths))
    with torch.device("meta"):
        symbolic = rope(torch.empty(1, 8, dtype=torch.int64), torch.empty(1, dtype=torch.int64))
    assert symbolic.shape == (1, 8, PLAIN.head_dim), "a meta tensor has no value to read"


def test_frequencies_stay_fp32_and_real_wherever_the_model_goes() -> None:
    want = Rope(PLAIN).frequencies
    for move in (
        lambda rope: rope.to(torch.bfloat16),
        lambda rope: rope.half(),
        lambda rope: rope.double().to("cpu", torch.float16),
        lambda rope: rope.to_empty(device="cpu"),
        lambda rope: torch.nn.Sequential(rope).bfloat16()[0],
    ):
        moved = move(Rope(PLAIN))
        assert moved.frequencies.dtype == torch.float32
        assert torch.equal(moved.frequencies, want)
    with torch.device("meta"):
        built = Rope(PLAIN)
    assert torch.equal(built.frequencies, want)
    assert "frequencies" in dict(built.named_buffers()) and not built.state_dict()
