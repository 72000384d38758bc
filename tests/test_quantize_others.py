"""Folders that `quantize.run` writes, read by transformers and compressed-tensors: they predict what we predict."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fastgen.checkpoint.hf_save import save_hf
from fastgen.config import ModelConfig
from fastgen.load import load_model, resolve
from quantize.run import main
from tests.models import TINY, random_weights

transformers = pytest.importorskip("transformers")
compressed_tensors = pytest.importorskip("compressed_tensors")

TEXT = "Once upon a time there was a little cat who liked to play in the park every day with a red ball."
LIMIT = 1e-5  # nats at any position, both in fp32

SYMMETRIC = {
    "int8": ["--quant", "int8"],
    "int4-g32": ["--quant", "int4", "--symmetric", "--group-size", "32"],
    "int4-g128": ["--quant", "int4", "--symmetric"],
    "mixed": ["--quant", "int4", "--symmetric", "--group-size", "64", "--keep", "layers.0=int8,layers.1.wo=bf16"],
}
ASYMMETRIC = {
    "int4-g32": ["--quant", "int4", "--group-size", "32"],
    "int4-g128": ["--quant", "int4"],
    "mixed": ["--quant", "int4", "--group-size", "64", "--keep", "layers.0=int8,w_down=bf16"],
}


def written(target: Path, flags: list[str], model: str = "stories") -> Path:
    assert main(["--model", model, "--out", str(target), "--device", "cpu", *flags]) == 0
    return target


def divergence(folder: Path, theirs: nn.Module) -> float:
    """The largest KL of our predictions of a text from theirs."""
    ours = load_model(folder, device="cpu", dtype="fp32")
    tokens = torch.tensor([ours.tokenizer.encode(TEXT)])
    count = tokens.shape[1]
    assert count > 16, "kernels of few tokens round their activations"
    with torch.inference_mode():
        ours.transformer.allocate_cache(1, count)
        positions = torch.arange(count)
        hidden = ours.transformer(tokens, positions[None], positions, torch.tensor([count]))
        mine = ours.transformer.logits(hidden[0]).double().log_softmax(-1)
        other = theirs(tokens).logits[0].double().log_softmax(-1)
    return float((other.exp() * (other - mine)).sum(-1).abs().max())


@pytest.mark.parametrize("name", SYMMETRIC)
def test_transformers_loads_a_symmetric_folder_as_it_is(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "out", SYMMETRIC[name])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert divergence(folder, theirs) < LIMIT


@pytest.mark.parametrize(
    "features",
    [{"qkv_bias": True}, {"qk_norm": True}, {"tie_embeddings": True}, {"qkv_bias": True, "tie_embeddings": True}],
    ids=str,
)
def test_transformers_loads_families_with_biases_norms_and_ties(tmp_path: Path, features: dict) -> None:
    config = ModelConfig(**(TINY | {"dim": 64, "head_dim": 16, "hidden_dim": 96, "vocab_size": 2048} | features))
    source = tmp_path / "source"
    source.mkdir()
    save_hf(source, config, random_weights(config, scale=0.2), torch.float32)
    shutil.copy(resolve("stories") / "tokenizer.json", source)
    flags = ["--quant", "int4", "--symmetric", "--keep", "layers.1.wqkv=int8"]
    folder = written(tmp_path / "out", flags, model=str(source))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert divergence(folder, theirs) < LIMIT


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_transformers_dequantizes_a_folder_with_zero_points(tmp_path: Path, group_size: int) -> None:
    """Left packed, transformers 5.23 expects zero points that are not, and refuses even compressed-tensors' own
    (https://github.com/vllm-project/llm-compressor/issues/1618); dequantizing, it knows one format a model."""
    flags = ["--quant", "int4", "--group-size", str(group_size), "--keep", "lm_head=bf16", "--dtype", "fp32"]
    folder = written(tmp_path / "out", flags)
    how = transformers.CompressedTensorsConfig(dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
    assert divergence(folder, theirs) < LIMIT


@pytest.mark.parametrize("name", ASYMMETRIC)
def test_compressed_tensors_unpacks_a_folder_with_zero_points(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "out", ASYMMETRIC[name])
    assert divergence(folder, decompressed(folder)) < LIMIT


def decompressed(folder: Path) -> nn.Module:
    """Transformers' model in fp32, with weights that compressed-tensors has unpacked by the folder's config."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    description = json.loads((folder / "config.json").read_text())
    quantization = QuantizationConfig.model_validate(description.pop("quantization_config"))
    config = transformers.LlamaConfig.from_dict(description)
    plain, marked = (transformers.LlamaForCausalLM(config).float() for _ in range(2))
    apply_quantization_config(marked, quantization)
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: wide(tensor) for name, tensor in load_file(file).items()}
    for name, module in marked.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme:
            parts = {key: tensors.pop(key) for key in list(tensors) if key.rpartition(".")[0] == name}
            state = BaseCompressor.get_value_from_registry(scheme.format).decompress(
                {key.rpartition(".")[2]: tensor for key, tensor in parts.items()}, scheme
            )
            tensors[f"{name}.weight"] = state["weight"]
    plain.load_state_dict(tensors)
    return plain


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor
