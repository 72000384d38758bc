"""Every supported family computes what transformers computes, from a folder that transformers wrote.

For each of the small random models below, in fp32: logits of a prompt that is prefilled in chunks, logits of 128
decoding steps, and the engine's greedy tokens, against `generate` and its eager attention. The prompt is longer than
a chunk and than every window; the text grows beyond the original length of every stretched RoPE.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.completion import GenerationOptions
from fastgen.config import ModelConfig
from fastgen.device import choose_placement
from fastgen.engine import Engine
from fastgen.load import LoadedModel, build
from fastgen.model import Transformer
from tests.models import ByteTokenizer

PROMPT, STEPS, CHUNK = 70, 128, 16
TOLERANCE = 1e-4  # of the logits' standard deviation; fp32 leaves about 1e-6

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
MHA, MQA, TIED = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": True}
SMOLLM2 = TIED | {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3}
WINDOW = {"sliding_window": 12}
UPPER_WINDOW = WINDOW | {"use_sliding_window": True, "num_hidden_layers": 3, "max_window_layers": 1}
MIXED_WINDOW = UPPER_WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def rope(kind: str, theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    """RoPE of some kind; the original length, where the kind has one, is shorter than the prompt."""
    if kind in ("yarn", "llama3"):
        parameters = {"original_max_position_embeddings": 32} | parameters
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


LLAMA3 = rope("llama3", 500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
DYNAMIC = rope("dynamic", factor=4.0) | {"max_position_embeddings": 64}
YARN = rope("yarn", factor=8.0)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-mha": {"model_type": "llama"} | MHA,
    "llama-gqa": {"model_type": "llama"},
    "llama-mqa": {"model_type": "llama"} | MQA,
    "llama-theta": {"model_type": "llama"} | rope("default", 500000.0),
    "llama-tied": {"model_type": "llama"} | TIED,
    "llama-smollm2": {"model_type": "llama"} | SMOLLM2 | rope("default", 100000.0),
    "llama-attention-bias": {"model_type": "llama", "attention_bias": True} | TIED,
    "llama-mlp-bias": {"model_type": "llama", "mlp_bias": True} | MHA,
    "llama-all-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 24},
    "llama-narrow-heads": {"model_type": "llama", "head_dim": 4} | MQA,
    "llama-eps-1e-2": {"model_type": "llama", "rms_norm_eps": 1e-2},
    "llama-eps-1e-8": {"model_type": "llama", "rms_norm_eps": 1e-8},
    "llama-linear": {"model_type": "llama"} | rope("linear", factor=4.0),
    "llama-dynamic": {"model_type": "llama"} | DYNAMIC,
    "llama-yarn": {"model_type": "llama"} | YARN,
    "llama-yarn-mscale": {"model_type": "llama"} | rope("yarn", factor=8.0, mscale=0.7, mscale_all_dim=1.4),
    "llama-yarn-untruncated": {"model_type": "llama"}
    | rope("yarn", factor=8.0, truncate=False, attention_factor=1.3, beta_fast=16.0, beta_slow=2.0),
    "llama-llama3": {"model_type": "llama"} | LLAMA3,
    "llama-llama3-tied": {"model_type": "llama", "head_dim": 16} | LLAMA3 | TIED,
    "mistral-full": {"model_type": "mistral", "sliding_window": None},
    "mistral-window": {"model_type": "mistral"} | WINDOW,
    "mistral-window-wide-heads": {"model_type": "mistral", "head_dim": 16} | WINDOW | MQA,
    "mistral-window-yarn": {"model_type": "mistral"} | WINDOW | YARN,
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied-yarn": {"model_type": "qwen2"} | TIED | YARN,
    "qwen2-upper-window": {"model_type": "qwen2"} | UPPER_WINDOW,
    "qwen2-mixed-window-dynamic": {"model_type": "qwen2"} | MIXED_WINDOW | DYNAMIC,
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied-mqa": {"model_type": "qwen3", "head_dim": 8} | TIED | MQA,
    "qwen3-bias": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True} | MHA,
    "qwen3-mixed-window-yarn": {"model_type": "qwen3", "head_dim": 16} | MIXED_WINDOW | YARN,
}
GENERATIONS = ("old keys", "new keys")  # of config.json: half of the models are read from each


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model as we load it, and what transformers' model says."""

    model: LoadedModel
    prompt: list[int]
    prompt_logits: Tensor  # [PROMPT, V]
    tokens: list[int]  # STEPS greedy ones
    step_logits: Tensor  # [STEPS, V], that these tokens were chosen from


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    seed = list(FAMILIES).index(name)
    theirs = random_transformers_model(SIZES | FAMILIES[name], seed)
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder, max_shard_size="20KB" if seed % 3 == 0 else "1GB")
    if GENERATIONS[seed % 2] == "old keys":
        write_old_keys(folder / "config.json")
    prompt = torch.randint(0, SIZES["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(seed))
    greedy = GenerationConfig(max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with torch.inference_mode():
        prompt_logits = theirs(prompt).logits[0]
        generated = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=greedy)
    return Pair(
        model=load(folder),
        prompt=prompt[0].tolist(),
        prompt_logits=prompt_logits,
        tokens=generated.sequences[0, PROMPT:].tolist(),
        step_logits=torch.cat(generated.logits),
    )


def random_transformers_model(fields: dict[str, Any], seed: int) -> PreTrainedModel:
    """An fp32 model whose norms and biases are random, too, and whose texts never end."""
    config = AutoConfig.for_model(**fields, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            parameter.data = 0.3 * noise
        else:
            parameter.data = noise if "embed" in name else 2 * noise / parameter.shape[1] ** 0.5
    return model


def write_old_keys(path: Path) -> None:
    """Rewrite a config.json of transformers 5 with the keys of transformers 4."""
    raw = json.loads(path.read_text())
    parameters = raw.pop("rope_parameters")
    raw["torch_dtype"] = raw.pop("dtype")
    raw["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    key = "rope_type" if kind == "llama3" else "type"
    raw["rope_scaling"] = None if kind == "default" else {key: kind, **parameters}
    path.write_text(json.dumps(raw))


def load(folder: Path) -> LoadedModel:
    checkpoint, placement = open_checkpoint(folder), choose_placement("cpu", "fp32")
    transformer = build(checkpoint.config, checkpoint.tensors, placement)
    return LoadedModel(transformer=transformer, tokenizer=ByteTokenizer(), checkpoint=checkpoint, placement=placement)


@torch.inference_mode()
def logits_in_pieces(model: Transformer, prompt: list[int], answer: list[int]) -> Iterator[Tensor]:
    """Yield our logits [n, V] piece by piece: the prompt in chunks, then the answer token by token."""
    text = torch.tensor([prompt + answer])
    model.allocate_cache(1, text.shape[1])
    starts = [*range(0, len(prompt), CHUNK), *range(len(prompt), text.shape[1])]
    for start, stop in zip(starts, [*starts[1:], text.shape[1]], strict=True):
        positions = torch.arange(start, stop)[None]
        length = torch.tensor([max(stop, len(prompt))])
        yield model.logits(model(text[:, start:stop], positions, torch.arange(stop), length))[0]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, in standard deviations of the logits."""
    return float((ours - theirs).abs().max() / theirs.std())


def test_logits_of_a_chunked_prompt_and_of_every_step_equal_transformers(pair: Pair) -> None:
    ours = torch.cat(list(logits_in_pieces(pair.model.transformer, pair.prompt, pair.tokens[:-1])))
    assert distance(ours[:PROMPT], pair.prompt_logits) < TOLERANCE
    assert distance(ours[PROMPT - 1 :], pair.step_logits) < TOLERANCE


def test_greedy_tokens_equal_transformers_over_128_steps(pair: Pair) -> None:
    options = GenerationOptions(max_new_tokens=STEPS, ignore_eos=True)
    (completion,) = Engine(pair.model).generate([pair.prompt], options)
    assert list(completion.tokens) == pair.tokens
    assert len(set(pair.tokens)) > 10, "a text of few tokens would prove little"


MISREADINGS: dict[str, dict[str, Any]] = {
    "llama-eps-1e-2": {"norm_eps": 1e-3},
    "llama-theta": {"rope_theta": 10000.0},
    "llama-linear": {"rope_scaling": None},
    "llama-yarn-mscale": {"rope_scaling": None},
    "llama-llama3": {"rope_scaling": None},
    "mistral-window": {"windows": (13, 13)},
    "qwen2-upper-window": {"windows": (12, 0, 0)},
    "qwen2-mixed-window-dynamic": {"rope_scaling": None},
}


@pytest.mark.parametrize("pair", MISREADINGS, indirect=True)
def test_a_misread_config_is_told_from_the_right_one(pair: Pair, request: pytest.FixtureRequest) -> None:
    """The tolerance has teeth: each of these readings of a model gives other logits."""
    right = pair.model.config
    wrong: ModelConfig = replace(right, **MISREADINGS[request.node.callspec.params["pair"]])
    model = build(wrong, pair.model.checkpoint.tensors, pair.model.placement)
    ours = torch.cat(list(logits_in_pieces(model, pair.prompt, [])))
    assert distance(ours, pair.prompt_logits) > 10 * TOLERANCE
