"""A tiny random model, written in every format by writers that share no code with the readers.

The model is a dict of fp32 tensors by their Hugging Face names, in the half-split order of query and key rows.
`fused` gives what the readers must return for it, by our names.
"""

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 40,
    "max_position_embeddings": 48,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TIED = LLAMA | {"tie_word_embeddings": True}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 32}
FAMILIES = {"llama": LLAMA, "tied": TIED, "qwen2": QWEN2, "qwen3": QWEN3}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

META_NAMES = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}


def make_model(config: Mapping[str, object], seed: int = 0) -> Tensors:
    """Return random weights for `config`, small enough to be exact to compare in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head, heads, kv_heads = config["head_dim"], config["num_attention_heads"], config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        rows = {"q": heads * head, "k": kv_heads * head, "v": kv_heads * head}
        for part, count in rows.items():
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (count, dim)
            if config["model_type"] == "qwen2":
                shapes[f"{prefix}self_attn.{part}_proj.bias"] = (count,)
        if config["model_type"] == "qwen3":
            shapes |= {f"{prefix}self_attn.{part}_norm.weight": (head,) for part in "qk"}
        shapes[f"{prefix}self_attn.o_proj.weight"] = (dim, heads * head)
        shapes[f"{prefix}mlp.gate_proj.weight"] = shapes[f"{prefix}mlp.up_proj.weight"] = (hidden, dim)
        shapes[f"{prefix}mlp.down_proj.weight"] = (dim, hidden)
        shapes[f"{prefix}input_layernorm.weight"] = shapes[f"{prefix}post_attention_layernorm.weight"] = (dim,)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def fused(model: Tensors) -> Tensors:
    """Return the tensors of `model` as the readers must give them."""
    ours = {"embedding.weight": model["model.embed_tokens.weight"], "norm.weight": model["model.norm.weight"]}
    if "lm_head.weight" in model:
        ours["lm_head.weight"] = model["lm_head.weight"]
    layers = 1 + max(int(name.split(".")[2]) for name in model if name.startswith("model.layers."))
    for layer in range(layers):
        old, new = f"model.layers.{layer}.", f"layers.{layer}."
        for leaf in ("weight", "bias"):
            if f"{old}self_attn.q_proj.{leaf}" in model:
                parts = [model[f"{old}self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                ours[f"{new}wqkv.{leaf}"] = torch.cat(parts)
        for part in "qk":
            if f"{old}self_attn.{part}_norm.weight" in model:
                ours[f"{new}{part}_norm.weight"] = model[f"{old}self_attn.{part}_norm.weight"]
        gate_up = [model[f"{old}mlp.{part}_proj.weight"] for part in ("gate", "up")]
        ours[f"{new}w_gate_up.weight"] = torch.cat(gate_up)
        ours[f"{new}w_down.weight"] = model[f"{old}mlp.down_proj.weight"]
        ours[f"{new}wo.weight"] = model[f"{old}self_attn.o_proj.weight"]
        ours[f"{new}attention_norm.weight"] = model[f"{old}input_layernorm.weight"]
        ours[f"{new}ffn_norm.weight"] = model[f"{old}post_attention_layernorm.weight"]
    return ours


def interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return query or key `rows` in the order of interleaved RoPE: j and j + d/2 of a head become 2j and 2j + 1."""
    order = []
    for head in range(0, rows.shape[0], head_dim):
        for pair in range(head_dim // 2):
            order += [head + pair, head + pair + head_dim // 2]
    return rows[order]


def is_query_or_key(name: str) -> bool:
    """Return whether `name` is the projection whose rows RoPE turns."""
    return "q_proj" in name or "k_proj" in name


def write_hf(folder: Path, config: Mapping[str, object], model: Tensors) -> Path:
    """Write config.json and one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_torch(folder: Path, config: Mapping[str, object], model: Mapping[str, object]) -> Path:
    """Write config.json and one PyTorch file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(dict(model), folder / "pytorch_model.bin")
    return folder


def write_sharded(
    folder: Path, config: Mapping[str, object], model: Tensors, *, name: str, save: Callable[[Tensors, Path], None]
) -> Path:
    """Write config.json, an index and three shards; `name` is the weight file's, as in `model.safetensors`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = name.rsplit(".", 1)
    shards = {tensor: f"{stem}-{number % 3 + 1:05}-of-00003.{suffix}" for number, tensor in enumerate(model)}
    for shard in set(shards.values()):
        save({tensor: model[tensor] for tensor in model if shards[tensor] == shard}, folder / shard)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return folder


def write_sharded_safetensors(folder: Path, config: Mapping[str, object], model: Tensors) -> Path:
    """Write three safetensors shards."""
    return write_sharded(folder, config, model, name="model.safetensors", save=save_file)


def write_sharded_torch(folder: Path, config: Mapping[str, object], model: Tensors) -> Path:
    """Write three PyTorch shards."""
    return write_sharded(folder, config, model, name="pytorch_model.bin", save=torch.save)


def gguf_metadata(config: Mapping[str, object]) -> dict[str, object]:
    """Return the metadata of `config` under their GGUF names, without a tokenizer's."""
    arch = config["model_type"]
    return {
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.key_length": config["head_dim"],
        f"{arch}.attention.value_length": config["head_dim"],
        f"{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{arch}.rope.freq_base": config["rope_theta"],
        f"{arch}.vocab_size": config["vocab_size"],
    }


def gguf_name(name: str) -> str:
    """Return the GGUF name of a tensor."""
    return renamed(name, GGUF_NAMES)


def renamed(name: str, parts: Mapping[str, str]) -> str:
    """Return a tensor's name with its parts in another scheme."""
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def gguf_arrays(config: Mapping[str, object], model: Tensors) -> dict[str, np.ndarray]:
    """Return the arrays of `model` under their GGUF names, rows in the order of the architecture."""
    turned = config["model_type"] == "llama"
    return {
        gguf_name(name): (
            interleaved(tensor, config["head_dim"]) if turned and is_query_or_key(name) else tensor
        ).numpy()
        for name, tensor in model.items()
    }


def write_gguf(
    path: Path,
    config: Mapping[str, object],
    model: Tensors,
    *,
    metadata: Mapping[str, object] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Write a GGUF file, matrices as `kind`; None among `metadata` takes a field away."""
    writer = gguf.GGUFWriter(path, config["model_type"])
    for key, value in (gguf_metadata(config) | dict(metadata or {})).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in (gguf_arrays(config, model) | dict(extra or {})).items():
        if array.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama2c(path: Path, config: Mapping[str, object], model: Tensors) -> Path:
    """Write llama2.c's first format."""
    dim, hidden, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    head, context = config["head_dim"], config["max_position_embeddings"]
    vocab = config["vocab_size"] if config["tie_word_embeddings"] else -config["vocab_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    kinds = ["input_layernorm"]
    kinds += [f"self_attn.{part}_proj" for part in "qkvo"]
    kinds += ["post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"]
    with path.open("wb") as file:
        file.write(struct.pack("<7i", dim, hidden, layers, heads, kv_heads, vocab, context))
        file.write(model["model.embed_tokens.weight"].numpy().tobytes())
        for kind in kinds:
            for layer in range(layers):
                tensor = model[f"model.layers.{layer}.{kind}.weight"]
                file.write((interleaved(tensor, head) if is_query_or_key(kind) else tensor).numpy().tobytes())
        file.write(model["model.norm.weight"].numpy().tobytes())
        file.write(np.zeros((2, context, head // 2), np.float32).tobytes())
        if vocab < 0:
            file.write(model["lm_head.weight"].numpy().tobytes())
    return path


def meta_params(config: Mapping[str, object]) -> dict[str, object]:
    """Return a `params.json` for `config`."""
    return {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "norm_eps": config["rms_norm_eps"],
        "rope_theta": config["rope_theta"],
        "multiple_of": config["intermediate_size"],  # a multiple of which the formula's result is below
        "ffn_dim_multiplier": 0.5,
        "vocab_size": -1,
        "max_seq_len": config["max_position_embeddings"],
    }


def write_meta(
    folder: Path, config: Mapping[str, object], model: Tensors, *, shards: int = 1, vocabulary_split: bool = False
) -> Path:
    """Write Meta's folder; its embedding is split by columns as in Llama 2, or by rows as in Llama 3."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(meta_params(config)))
    whole = {
        renamed(name, META_NAMES): interleaved(tensor, config["head_dim"]) if is_query_or_key(name) else tensor
        for name, tensor in model.items()
    }
    for rank in range(shards):
        state = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            by_columns = ".wo." in name or ".w2." in name or ("tok_emb" in name and not vocabulary_split)
            if "norm" in name:
                state[name] = tensor.clone()
            else:
                state[name] = tensor.chunk(shards, dim=int(by_columns))[rank].clone()
        torch.save(state, folder / f"consolidated.{rank:02}.pth")
    return folder


def write_sharded_meta(folder: Path, config: Mapping[str, object], model: Tensors) -> Path:
    """Write Meta's folder in two shards, as Llama 2 has them."""
    return write_meta(folder, config, model, shards=2)
