"""What a model is: one frozen `ModelConfig`, checked at construction, the same for every checkpoint format.

The formats (`fastgen.checkpoint`) translate their own metadata into it; nothing is ever inferred from a path.
A model of the family is this block, repeated `n_layers` times (letters: D `dim`, H `n_heads`, K `n_kv_heads`,
d `head_dim`, F `hidden_dim`, V `vocab_size`):

    x += wo( attend( wqkv( rms_norm(x) ) ) )              wqkv: D -> (H + 2K) d     wo: H d -> D
    x += w_down( silu(gate) * up )                        w_gate_up: D -> 2F        w_down: F -> D
    gate, up = w_gate_up( rms_norm(x) )
"""

from dataclasses import dataclass, field
from math import inf

from fastgen.errors import ModelFileError

MAX_LAYERS = 4096
"""Far above any model; keeps a damaged header from asking for gigabytes of per-layer settings."""


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE's frequencies are stretched beyond the context that a model was trained on.

    `kind` is linear, dynamic (NTK), yarn or llama3; the meaning of every field is that of the Hugging Face
    `rope_parameters` of the same name. Formulas and sources: `fastgen.kernels.rope`.
    """

    kind: str
    factor: float
    original_max_seq_len: int
    attention_factor: float | None = None  # yarn
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    def __post_init__(self) -> None:
        if self.kind not in ("linear", "dynamic", "yarn", "llama3"):
            raise ModelFileError(f"rope scaling {self.kind!r} is not supported: linear, dynamic, yarn or llama3")
        if not 1 <= self.factor < inf or self.original_max_seq_len < 1:
            raise ModelFileError(
                f"rope scaling {self.kind!r}: factor {self.factor} and original length "
                f"{self.original_max_seq_len} must be at least 1"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ModelFileError(
                f"rope scaling 'llama3': low_freq_factor {self.low_freq_factor} must lie between 0 and "
                f"high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A model of the LLaMA family. Raises `ModelFileError` when its numbers contradict each other."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    max_seq_len: int  # positions that the model was made for
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False  # of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of every query and key head before RoPE (Qwen3)
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 = full attention; () = all full
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        sizes = (
            "dim",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "hidden_dim",
            "vocab_size",
            "max_seq_len",
        )
        for name in sizes:
            if not 1 <= getattr(self, name) <= 2**31 - 1:
                raise ModelFileError(f"model config: {name} is {getattr(self, name)}, expected a positive size")
        if self.n_layers > MAX_LAYERS:
            raise ModelFileError(f"model config: n_layers is {self.n_layers}, expected at most {MAX_LAYERS}")
        if self.n_heads % self.n_kv_heads:
            raise ModelFileError(
                f"model config: {self.n_heads} attention heads are not a multiple of {self.n_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ModelFileError(f"model config: head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if not 0 < self.norm_eps < 1 or not 1 < self.rope_theta < inf:
            raise ModelFileError(
                f"model config: norm_eps {self.norm_eps} must lie between 0 and 1, rope_theta {self.rope_theta} above 1"
            )
        if self.windows and (len(self.windows) != self.n_layers or min(self.windows) < 0):
            raise ModelFileError(
                f"model config: {len(self.windows)} sliding windows for {self.n_layers} layers, or one below 0"
            )
        object.__setattr__(self, "windows", self.windows or (0,) * self.n_layers)

    @property
    def q_dim(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key (or value) heads together."""
        return self.n_kv_heads * self.head_dim
