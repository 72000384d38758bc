"""Hugging Face `config.json` to `ModelConfig`: against transformers' own reading, and everything that is refused."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastgen.checkpoint.hf_config import DEFAULTS, config_from_hf, read_hf_config
from fastgen.config import ModelConfig
from fastgen.errors import ModelFileError
from fastgen.kernels.rope import Rope, inverse_frequencies

HERE = Path("some/config.json")

# As published, without the keys that have no bearing on the maths and some that must be ignored.
LLAMA31_ROPE = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
PUBLISHED: dict[str, dict[str, object]] = {
    "llama-1": {
        "architectures": ["LLaMAForCausalLM"], "model_type": "llama", "bos_token_id": 0, "eos_token_id": 1,
        "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02,
        "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1, "rms_norm_eps": 1e-06,
        "torch_dtype": "float16", "use_cache": True, "vocab_size": 32000,
    },
    "llama-3.1": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": LLAMA31_ROPE, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 128256,
    },
    "llama-3.2": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 64, "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 128256,
        "rope_scaling": LLAMA31_ROPE | {"factor": 32.0}, "rope_theta": 500000.0, "tie_word_embeddings": True,
        "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "hidden_act": "silu", "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
        "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    },
    "mistral-0.1": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
        "sliding_window": 4096, "vocab_size": 32000,
    },
    "mistral-nemo": {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 128, "hidden_size": 5120,
        "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "sliding_window": None, "vocab_size": 131072,
    },
    "qwen2.5": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_size": 3584, "intermediate_size": 18944,
        "max_position_embeddings": 32768, "max_window_layers": 28, "num_attention_heads": 28,
        "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False, "vocab_size": 152064,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip

SMALL = {
    "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 256,
}  # fmt: skip
WINDOWED = {"use_sliding_window": True, "sliding_window": 16}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, dict[str, object]] = {
    **{f"only-{family}": {"model_type": family} for family in DEFAULTS},
    "optional-null": {"model_type": "llama", "head_dim": None, "num_key_value_heads": None},
    "mlp-and-attention-bias": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "qwen3-bias": SMALL | {"attention_bias": True},
    "window-of-upper-layers": SMALL | WINDOWED | {"max_window_layers": 3},
    "window-of-all-layers": SMALL | WINDOWED | {"model_type": "qwen2", "max_window_layers": 0},
    "window-of-no-layer": SMALL | WINDOWED | {"max_window_layers": 4},
    "window-switched-off": SMALL | {"sliding_window": 16, "max_window_layers": 0},
    "layer-types": SMALL | WINDOWED | {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "layer-types-of-llama": {"model_type": "llama", "layer_types": ["full_attention"] * 32},
    "layer-types-of-mistral": {"model_type": "mistral", "layer_types": ["sliding_attention"] * 32},
    "layer-types-of-mistral-without-window": {
        "model_type": "mistral",
        "sliding_window": None,
        "layer_types": ["full_attention"] * 32,
    },
    "linear": SMALL | {"rope_scaling": {"type": "linear", "factor": 2}},
    "dynamic": SMALL | {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5000.0},
    "dynamic-new": SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 5000.0}},
    "yarn-original-beside-wins": SMALL | {"original_max_position_embeddings": 128, "rope_scaling": YARN},
    "yarn-without-original": SMALL | {"rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn-factor-null": SMALL | {"rope_parameters": YARN | {"rope_theta": 1e4, "factor": None}},
    "yarn-all": SMALL
    | {"rope_parameters": YARN | {"beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 1.0}},
    "yarn-truncate": SMALL | {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.5}},
    "llama3-without-original": SMALL
    | {"rope_scaling": {k: v for k, v in LLAMA31_ROPE.items() if not k.startswith("original")}},
    "type-and-rope-type": SMALL | {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 3.0}},
    "scaling-before-parameters": SMALL
    | {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    "theta-inside-wins": SMALL
    | {"rope_theta": 123.0, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    "theta-beside": SMALL | {"rope_theta": 123.0, "rope_parameters": {"rope_type": "default"}},
    "parameters-of-other-kinds": SMALL
    | {"rope_scaling": {"type": "linear", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1.0}},
}


@pytest.mark.parametrize("raw", [*PUBLISHED.values(), *VARIANTS.values()], ids=[*PUBLISHED, *VARIANTS])
def test_every_field_means_what_it_means_to_transformers(raw: dict[str, object]) -> None:
    ours = config_from_hf(raw, HERE)
    theirs = AutoConfig.for_model(**json.loads(json.dumps(raw)))
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    eos = theirs.eos_token_id
    assert ours.dim == theirs.hidden_size
    assert ours.n_layers == theirs.num_hidden_layers
    assert (ours.n_heads, ours.n_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert (ours.head_dim, ours.hidden_dim) == (head_dim, theirs.intermediate_size)
    assert (ours.vocab_size, ours.norm_eps) == (theirs.vocab_size, theirs.rms_norm_eps)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_ids == (() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,))
    window = getattr(theirs, "sliding_window", None) or 0
    if types := getattr(theirs, "layer_types", None):
        assert ours.windows == tuple(window if kind == "sliding_attention" else 0 for kind in types)
    else:
        assert ours.windows == (window,) * ours.n_layers
    biased = getattr(theirs, "attention_bias", False)
    assert (ours.qkv_bias, ours.output_bias) == (biased or theirs.model_type == "qwen2", biased)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    assert ours.qk_norm == (theirs.model_type == "qwen3")

    rope = LlamaRotaryEmbedding(theirs)
    frequencies, attention_factor = inverse_frequencies(ours)
    assert frequencies.tolist() == rope.inv_freq.tolist()
    assert attention_factor == rope.attention_scaling
    kind = ours.rope_scaling.kind if ours.rope_scaling else "default"
    assert (kind, ours.rope_theta) == (theirs.rope_parameters["rope_type"], theirs.rope_parameters["rope_theta"])


def test_stretched_models_are_made_for_the_stretched_length() -> None:
    lengths = {name: config_from_hf(raw, HERE).max_seq_len for name, raw in (PUBLISHED | VARIANTS).items()}
    assert lengths["llama-3.1"] == 131072
    assert lengths["qwen2.5"] == 131072, "32768 positions, YaRN by 4"
    assert lengths["qwen3"] == 40960
    assert lengths["dynamic"] == 512
    assert lengths["linear"] == 256


def test_a_file_without_model_type_is_read_by_its_architecture() -> None:
    raw = {key: value for key, value in PUBLISHED["mistral-0.1"].items() if key != "model_type"}
    assert config_from_hf(raw, HERE) == config_from_hf(PUBLISHED["mistral-0.1"], HERE)


REFUSED: dict[str, tuple[dict[str, object], tuple[str, ...]]] = {
    "other-model": ({"model_type": "smollm3"}, ("'smollm3'", "llama, mistral, qwen2, qwen3")),
    "no-model": ({"model_type": None}, ("not supported", "llama, mistral, qwen2, qwen3")),
    "model-type-of-wrong-type": ({"model_type": ["llama"]}, ("['llama']",)),
    "other-class": ({"architectures": ["LlamaForSequenceClassification"]}, ("LlamaForSeq", "'llama'")),
    "classes-of-wrong-type": ({"architectures": "LlamaForCausalLM"}, ("architectures", "list")),
    "class-against-type": ({"architectures": ["MistralForCausalLM"]}, ("MistralForCausalLM", "'llama'")),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
    "longrope": ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, ("rope_scaling.type", "'longrope'")),
    "mrope": ({"rope_scaling": {"rope_type": "mrope"}}, ("rope_scaling.rope_type", "'mrope'", "'yarn'")),
    "rope-null": ({"rope_parameters": {"rope_type": None}}, ("rope_parameters.rope_type", "None")),
    "rope-by-layer-type": (
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        ("rope_parameters.full_attention",),
    ),
    "rope-unknown-key": ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "alpha": 3}}, ("alpha", "3")),
    "rope-no-factor": ({"rope_scaling": {"type": "linear"}}, ("rope_scaling.factor", "missing")),
    "rope-small-factor": ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ("factor", "0.5")),
    "rope-list": ({"rope_scaling": [1]}, ("rope_scaling", "[1]", "object")),
    "llama3-no-low": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ("low_freq_factor", "missing")),
    "llama3-crossed": ({"rope_scaling": LLAMA31_ROPE | {"low_freq_factor": 5.0}}, ("low_freq_factor", "5.0")),
    "partial-rotary": ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor", "0.5")),
    "partial-rotary-inside": (
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        ("rope_parameters.partial_rotary_factor", "0.25"),
    ),
    "theta-of-one": ({"rope_theta": 1}, ("rope_theta", "above 1")),
    "nope-layers": ({"no_rope_layers": [1, 0]}, ("no_rope_layers",)),
    "experts": ({"num_experts": 8}, ("num_experts", "8")),
    "local-experts": ({"num_local_experts": 4}, ("num_local_experts",)),
    "router": ({"router_aux_loss_coef": 0.1}, ("router_aux_loss_coef",)),
    "softcap": ({"final_logit_softcapping": 30.0}, ("final_logit_softcapping", "30.0")),
    "multiplier": ({"embedding_multiplier": 12.0}, ("embedding_multiplier",)),
    "logit-scale": ({"logit_scale": 0.06}, ("logit_scale", "0.06")),
    "clip": ({"clip_qkv": 8.0}, ("clip_qkv",)),
    "qk-norm-of-llama": ({"use_qk_norm": True}, ("use_qk_norm", "True")),
    "window-of-llama": ({"sliding_window": 4096}, ("sliding_window", "4096")),
    "chunked-attention": ({"attention_chunk_size": 8192}, ("attention_chunk_size",)),
    "layer-types-of-llama": ({"layer_types": ["sliding_attention"] * 32}, ("layer_types", "full attention only")),
    "layer-types-of-mistral": (
        {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"] * 16},
        ("layer_types", "sliding attention only"),
    ),
    "bias-of-mistral": ({"model_type": "mistral", "attention_bias": True}, ("attention_bias", "True")),
    "mlp-bias-of-qwen": ({"model_type": "qwen3", "mlp_bias": True}, ("mlp_bias", "True")),
    "layer-types-too-few": (
        {"model_type": "qwen3", "layer_types": ["full_attention"]},
        ("layer_types", "32 times"),
    ),
    "layer-types-unknown": (
        {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["linear_attention"]},
        ("layer_types", "linear_attention"),
    ),
    "layer-types-without-window": (
        {"model_type": "qwen3", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
        ("layer_types", "use_sliding_window"),
    ),
    "heads-do-not-divide": ({"hidden_size": 4097}, ("hidden_size", "4097", "32")),
    "kv-heads-do-not-divide": ({"num_key_value_heads": 5}, ("32", "5 KV heads")),
    "odd-head": ({"head_dim": 63}, ("head_dim 63",)),
    "dynamic-narrow": (
        {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ("dynamic", "wider than 2"),
    ),
    "eps": ({"rms_norm_eps": 1.5}, ("norm_eps", "1.5")),
    "stop-outside-vocabulary": ({"eos_token_id": [2, 32000]}, ("eos_token_id", "32000 tokens")),
    "bos-negative": ({"bos_token_id": -1}, ("bos_token_id", "-1")),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_supported_is_refused_by_file_field_and_value(
    changes: dict[str, object], said: tuple[str, ...]
) -> None:
    with pytest.raises(ModelFileError) as caught:
        config_from_hf({"model_type": "llama", **changes}, HERE)
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    assert not [part for part in said if part not in message], message


HARMLESS: dict[str, object] = {
    "attention_dropout": 0.1, "resid_pdrop": 0.1, "pretraining_tp": 4, "use_cache": True, "use_flash_attn": True,
    "_attn_implementation_autoset": True, "attn_implementation": "eager", "output_attentions": True,
    "transformers_version": "4.31.0", "quantization_config": {"quant_method": "gptq"}, "auto_map": {"a": "b"},
    "num_experts": 0, "logit_scale": None, "use_qk_norm": False, "clip_qkv": None, "no_rope_layers": [],
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_keys_without_a_bearing_on_the_maths_are_passed_over(key: str) -> None:
    plain = config_from_hf({"model_type": "llama"}, HERE)
    assert config_from_hf({"model_type": "llama", key: HARMLESS[key]}, HERE) == plain


WRONG: dict[str, list[object]] = {
    "size": ["32", True, None, -1, 0, 1.0, 2**31, float("nan"), [], {}, 10**400],
    "number": ["1", True, None, -1.0, float("nan"), float("inf"), 10**400, [], {}],
    "flag": [None, 0, 1, "true", [], {}],
}
KINDS = {
    "hidden_size": "size",
    "intermediate_size": "size",
    "num_hidden_layers": "size",
    "num_attention_heads": "size",
    "vocab_size": "size",
    "max_position_embeddings": "size",
    "rms_norm_eps": "number",
    "rope_theta": "number",
    "tie_word_embeddings": "flag",
    "attention_bias": "flag",
    "use_sliding_window": "flag",
}


@pytest.mark.parametrize("field", KINDS)
def test_wrong_types_and_values_are_named(field: str) -> None:
    for value in WRONG[KINDS[field]]:
        with pytest.raises(ModelFileError, match=rf"^some/config.json: {field} is .*, expected ") as caught:
            config_from_hf({"model_type": "qwen3", field: value}, HERE)
        assert len(str(caught.value)) < 200, "a huge value is shortened"


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from(["yarn", "dynamic", "linear", "llama3", "sliding_attention", "full_attention"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["rope_type", "factor", "low_freq_factor", "high_freq_factor"]), inner),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(DEFAULTS)),
    st.dictionaries(st.sampled_from(sorted({**DEFAULTS["llama"], **DEFAULTS["qwen3"]})), JUNK, max_size=3),
)
def test_any_json_gives_a_usable_config_or_a_typed_error(family: str, changes: dict[str, object]) -> None:
    try:
        config = config_from_hf({**SMALL, "model_type": family, **changes}, HERE)
    except ModelFileError as error:
        assert str(error).startswith("some/config.json: ")
    else:
        assert isinstance(config, ModelConfig)
        assert Rope(config).frequencies.isfinite().all()


def write(folder: Path, name: str, content: bytes | object) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def test_stop_tokens_are_those_of_the_generation_config(tmp_path: Path) -> None:
    path = write(tmp_path, "config.json", SMALL | {"eos_token_id": 5})
    assert read_hf_config(path).eos_token_ids == (5,)
    for stops, want in (([7, 8], (7, 8)), (9, (9,)), (None, (5,))):
        write(tmp_path, "generation_config.json", {"eos_token_id": stops})
        assert read_hf_config(path).eos_token_ids == want
    for wrong in ("7", [97], [True], {"a": 1}):
        write(tmp_path, "generation_config.json", {"eos_token_id": wrong})
        with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id is .* 97 tokens"):
            read_hf_config(path)


BROKEN = {
    "empty": b"",
    "truncated": b'{"model_type": "llama"',
    "list": b"[1, 2]",
    "number": b"7",
    "not-utf8": b'{"model_type": "\xff"}',
    "utf-16": '{"model_type": "llama"}'.encode("utf-16"),
    "nested-lists": b"[" * 200_000,
    "nested-objects": b'{"a":' * 200_000,
    "endless-number": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
    "contradiction": b'{"model_type": "llama", "vocab_size": 5, "vocab_size": 6}',
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_one_short_error(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path, "config.json", SMALL)
    broken = write(tmp_path, name, content)
    with pytest.raises(ModelFileError) as caught:
        read_hf_config(path)
    assert str(caught.value).startswith(f"{broken}: ")
    assert len(str(caught.value)) < len(str(broken)) + 200


def test_a_byte_order_mark_in_front_is_passed_over(tmp_path: Path) -> None:
    plain = read_hf_config(write(tmp_path, "config.json", SMALL))
    (tmp_path / "config.json").write_text(json.dumps(SMALL), encoding="utf-8-sig")
    assert read_hf_config(tmp_path / "config.json") == plain


def test_what_is_no_regular_file_of_a_sane_size_is_refused(tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    os.mkfifo(tmp_path / "fifo.json")
    for name, said in (("huge.json", "1099511627776"), ("fifo.json", "regular"), (".", "regular"), ("no", "No such")):
        with pytest.raises(ModelFileError, match=said):
            read_hf_config(tmp_path / name)
