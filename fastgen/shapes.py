"""Published model shapes by name, for benchmarks with random weights: speed does not depend on what the weights say."""

from fastgen.config import ModelConfig
from fastgen.errors import UsageError

SHAPES = {
    "llama-2-7b": ModelConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, hidden_dim=11008, vocab_size=32000,
        max_seq_len=4096,
    ),
    "llama-2-70b": ModelConfig(
        dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, head_dim=128, hidden_dim=28672, vocab_size=32000,
        max_seq_len=4096,
    ),
    "llama-3-8b": ModelConfig(
        dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, hidden_dim=14336, vocab_size=128256,
        max_seq_len=8192, rope_theta=500000.0,
    ),
    "llama-3.2-1b": ModelConfig(
        dim=2048, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64, hidden_dim=8192, vocab_size=128256,
        max_seq_len=131072, rope_theta=500000.0, tie_embeddings=True,
    ),
    "tinyllama-1.1b": ModelConfig(
        dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64, hidden_dim=5632, vocab_size=32000,
        max_seq_len=2048,
    ),
    "stories110m": ModelConfig(
        dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048, vocab_size=32000,
        max_seq_len=1024, tie_embeddings=True,
    ),
    "stories15m": ModelConfig(
        dim=288, n_layers=6, n_heads=6, n_kv_heads=6, head_dim=48, hidden_dim=768, vocab_size=32000, max_seq_len=256,
        tie_embeddings=True,
    ),
}  # fmt: skip


def shape(name: str) -> ModelConfig:
    """Return the shape of that name; raises `UsageError` for one that is not known."""
    if name not in SHAPES:
        raise UsageError(f"--shape {name}: expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
