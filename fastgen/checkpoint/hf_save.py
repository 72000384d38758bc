"""Writing a Hugging Face folder's description and weights: `config.json`, `generation_config.json`, safetensors.

The inverse of `hf_config` and `hf`: what is written here, they read back, and transformers loads. Which of the
model types describes a model follows from its features; `llama` is the plain one.

    with staged_folder(target) as folder:
        save_hf(folder, config, transformer.state_dict(), torch.bfloat16)
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fastgen.checkpoint.names import HF, part_rows
from fastgen.config import ModelConfig, RopeScaling
from fastgen.errors import CapacityError, UsageError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}

INDEX = "model.safetensors.index.json"

YARN_FIELDS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
LLAMA3_FIELDS = ("low_freq_factor", "high_freq_factor")


def save_hf(folder: Path, config: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Write a model's description and its weights in `dtype` into the existing `folder`.

    Args:
        tensors: every parameter of the model by our names (`fastgen.model`), on any device; a head that is tied may
            be among them and is left out.

    Raises:
        CapacityError: the weights cannot be written, most likely for want of space.
        UsageError: no model type has the features of `config`.
    """
    write_description(folder, config, hf_config(config, dtype))
    # A copy of its own for each part: safetensors refuses tensors that share memory.
    parts = {name: part.detach().to("cpu", dtype, copy=True) for name, part in hf_tensors(config, tensors)}
    save_tensors(folder / "model.safetensors", parts, {"format": "pt"})


def write_description(folder: Path, config: ModelConfig, description: Mapping[str, object]) -> None:
    """Write the `config.json` that `hf_config` began, and what generation needs to know, into `folder`."""
    write_json(folder / "config.json", description)
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids) or None}
    write_json(folder / "generation_config.json", {name: value for name, value in tokens.items() if value is not None})


def hf_tensors(config: ModelConfig, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's tensors by Hugging Face's names, as views of ours; a tied head is the embedding, and left out."""
    for name, tensor in tensors.items():
        if name != "lm_head.weight" or not config.tie_embeddings:
            module, leaf = name.rsplit(".", 1)
            for theirs, rows in hf_parts(config, module, tensor.shape[0]):
                yield f"{theirs}.{leaf}", tensor[rows]


def hf_parts(config: ModelConfig, module: str, rows: int) -> Iterator[tuple[str, slice]]:
    """Yield the Hugging Face modules that our `module` of so many rows is made up of, each with its rows."""
    if module in HF.model:
        yield HF.model[module], slice(0, rows)
        return
    _, layer, kind = module.split(".")
    first = 0
    for name, count in zip(HF.layer[kind], part_rows(config, kind) or [rows], strict=True):
        yield HF.layer_prefix.format(layer) + name, slice(first, first + count)
        first += count


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of CPU tensors; raises `CapacityError` where the library cannot."""
    try:
        save_file(dict(tensors), path, metadata=dict(metadata))
        path.chmod(path.parent.stat().st_mode & 0o666)  # the library makes files that only the owner reads
    except SafetensorError as error:  # its only cause with sound tensors is the file system
        raise CapacityError(
            f"{path.name}: cannot be written: {error}; what was there before is untouched\n"
            "Free some space, or write to another disk"
        ) from error


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object for people and machines."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, object]:
    """Return the content of a `config.json` from which `config_from_hf` gives `config` again.

    Raises `UsageError` for features that no model type combines.
    """
    family = _family(config)
    eos, scaling = list(config.eos_token_ids), config.rope_scaling
    positions = config.max_seq_len
    if scaling and scaling.kind == "dynamic":
        positions = scaling.original_max_seq_len  # which dynamic scaling knows by this field alone
    content: dict[str, object] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": positions,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_scaling(scaling) if scaling else None,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == "llama":
        content |= {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    elif family == "mistral":
        content |= {"sliding_window": config.windows[0]}
    elif family == "qwen3":
        content |= {"attention_bias": config.qkv_bias}
    return content


def _family(config: ModelConfig) -> str:
    window = config.windows[0]
    uniform = all(other == window for other in config.windows)
    if uniform and not config.mlp_bias:
        if config.qk_norm and not window and config.qkv_bias == config.output_bias:
            return "qwen3"
        if config.qkv_bias and not config.output_bias and not config.qk_norm and not window:
            return "qwen2"
        if window and not config.qkv_bias and not config.output_bias and not config.qk_norm:
            return "mistral"
    if uniform and not window and not config.qk_norm and config.qkv_bias == config.output_bias:
        return "llama"
    raise UsageError(
        "this model cannot be written: its mix of biases, q/k norms and sliding windows is none of "
        f"{', '.join(ARCHITECTURES)}"
    )


def _rope_scaling(scaling: RopeScaling) -> dict[str, object]:
    names = {"yarn": YARN_FIELDS, "llama3": LLAMA3_FIELDS}.get(scaling.kind, ())
    fields = {name: getattr(scaling, name) for name in names}
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
        **{name: value for name, value in fields.items() if value is not None},
    }
