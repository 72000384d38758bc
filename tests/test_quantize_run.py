"""Folders that `quantize.run` writes: they load, here and elsewhere, damage is found, and mistakes are told."""

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file

from fastgen import convert, evaluate
from fastgen.checkpoint.detect import open_checkpoint
from fastgen.completion import GenerationOptions
from fastgen.engine import Engine
from fastgen.errors import CapacityError, FastgenError, ModelFileError, UsageError
from fastgen.load import LoadedModel, load_model, resolve
from fastgen.manifest import NAME, verify_manifest
from quantize.run import main
from tests.checkpoint_writers import TIED, make_model, write_gguf
from tests.vocabularies import sentencepiece_as_gguf, small_sentencepiece

SCHEMES = {
    "int8": {"quant": "int8"},
    "int4": {"quant": "int4"},
    "int4-g32-symmetric": {"quant": "int4", "group_size": 32, "symmetric": True},
    "mixed": {"quant": "int4", "group_size": 64, "keep": "lm_head=bf16,layers.0=int8,layers.1.wo=bf16"},
}


def flags(scheme: dict) -> list[str]:
    words = {name: value for name, value in scheme.items() if name != "symmetric"}
    return [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))] + (
        ["--symmetric"] if scheme.get("symmetric") else []
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded model, quantized by every scheme."""
    parent = tmp_path_factory.mktemp("quantized")
    for name, scheme in SCHEMES.items():
        assert main(["--model", "stories", "--out", str(parent / name), "--device", "cpu", *flags(scheme)]) == 0
    return {name: parent / name for name in SCHEMES}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folders["int4"], tmp_path / "copy"))


def greedy(model: LoadedModel) -> list[tuple[int, ...]]:
    engine, options = Engine(model, max_seq_len=96), GenerationOptions(max_new_tokens=40, ignore_eos=True)
    return [engine.generate([prompt], options)[0].tokens for prompt in ("Once upon a time", "Tom and Lily went " * 3)]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", SCHEMES)
def test_a_folder_generates_what_quantizing_at_load_does(folders: dict[str, Path], name: str, dtype: str) -> None:
    at_load = load_model("stories", device="cpu", dtype=dtype, **SCHEMES[name])
    stored = load_model(folders[name], device="cpu", dtype=dtype)
    assert stored.formats == at_load.formats
    assert stored.transformer.weight_bytes() == at_load.transformer.weight_bytes()
    assert greedy(stored) == greedy(at_load)


def test_a_folder_is_complete_and_says_what_it_holds(folders: dict[str, Path]) -> None:
    folder = folders["mixed"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert {"lm_head", "model.layers.1.self_attn.o_proj"} <= set(config["ignore"])
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 8]
    report = json.loads((folder / "quantize.json").read_text())
    shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert report["bytes"] <= shards <= report["bytes"] * 1.02 + 20000
    assert (folder / "tokenizer.json").read_bytes() == (resolve("stories") / "tokenizer.json").read_bytes()
    assert not verify_manifest(folder)


def test_the_report_states_bits_and_errors(folders: dict[str, Path]) -> None:
    report = json.loads((folders["int4"] / "quantize.json").read_text())
    plain, stored = (load_model(source, device="cpu", dtype="fp32") for source in ("stories", folders["int4"]))
    count = size = 0
    for row in report["linears"]:
        weight = plain.transformer.get_submodule(row["name"]).weight
        back = stored.transformer.get_submodule(row["name"])(torch.eye(weight.shape[1])).T
        assert row["relative_error"] == pytest.approx(((back - weight).norm() / weight.norm()).item(), rel=1e-4)
        # A scale is bf16, a zero point 4 bits.
        assert row["bits"] == (8 + 16 / weight.shape[1] if row["name"] == "lm_head" else 4 + (16 + 4) / 128)
        assert 8 * row["bytes"] == row["bits"] * weight.numel()
        count, size = count + weight.numel(), size + row["bytes"]
    assert report["effective_bits"] == pytest.approx(8 * size / count)


def test_measuring_compares_with_the_original(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a little girl. She liked to play with her red ball in the park. " * 8)
    out = tmp_path / "out"
    assert main(["--model", "stories", "--quant", "int8", "--out", str(out), "--measure", str(text)]) == 0
    measured = json.loads((out / "quantize.json").read_text())["measured"]
    assert 0 < measured["mean_kl"] < 0.005
    assert measured["perplexity"] == pytest.approx(measured["original_perplexity"], rel=0.02)
    assert measured["top1_agreement"] > 0.95
    assert evaluate.main(["--model", str(out), "--against", "stories", "--text", str(text)]) == 0


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)])
def test_what_stays_plain_has_the_sources_bits_or_the_scales_dtype(
    tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    words = sentencepiece_as_gguf(sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece()))
    config = TIED | {"vocab_size": len(words["tokenizer.ggml.tokens"])}
    source = write_gguf(
        tmp_path / "model.gguf", config, make_model(config), kind=GGMLQuantizationType[kind],
        metadata=words | {"llama.vocab_size": None},
    )  # fmt: skip
    target = tmp_path / "out"
    assert main(["--model", str(source), "--out", str(target), "--quant", "int8", "--device", "cpu"]) == 0
    written, read = open_checkpoint(target), open_checkpoint(source)
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("torch.")
    for name in ("embedding.weight", "norm.weight", "lm_head.weight_scale"):
        assert written.tensors[name].dtype == dtype, name
    assert torch.equal(written.tensors["embedding.weight"][:], read.tensors["embedding.weight"][:].to(dtype))


def flip_a_bit(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        value = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([value ^ 1 << bit % 8]))


def small_folder(target: Path) -> Path:
    """A folder as `quantize.run` writes it, with a model so small that it is hashed in no time."""
    from fastgen.manifest import write_manifest

    target.mkdir()
    save_file({"w": torch.arange(4000, dtype=torch.int32)}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({"quantization_config": {"format": "pack-quantized"}}))
    (target / "tokenizer.json").write_text(json.dumps({"model": {"vocab": list(range(300))}}))
    write_manifest(target)
    return target


@pytest.mark.parametrize("flips", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found(tmp_path: Path, flips: int) -> None:
    folder, chance = small_folder(tmp_path / "small"), random.Random(0)
    files = sorted(folder.iterdir())
    sizes = [path.stat().st_size for path in files]
    for flip in range(flips):
        path = files[flip % len(files)] if flip % 2 else chance.choices(files, sizes)[0]
        bit = chance.randrange(8 * path.stat().st_size)
        flip_a_bit(path, bit)
        assert verify_manifest(folder), f"bit {bit} of {path.name}"
        flip_a_bit(path, bit)
    assert not verify_manifest(folder)


def test_a_manifest_in_other_bytes_is_damaged(tmp_path: Path) -> None:
    folder = small_folder(tmp_path / "small")
    content = json.loads((folder / NAME).read_bytes())
    for damaged in (
        json.dumps(content),
        json.dumps(content | {"more": 1}, indent=1, sort_keys=True) + "\n\n",
        "{}",
        "[",
    ):
        (folder / NAME).write_text(damaged)
        assert verify_manifest(folder) == [f"{NAME}: damaged"]


def test_verify_names_what_is_damaged_missing_or_new(folder: Path) -> None:
    assert convert.main(["--verify", str(folder)]) == 0
    (folder / "tokenizer.json").unlink()
    (folder / "extra.txt").write_text("new")
    flip_a_bit(next(folder.glob("*.safetensors")), 12345)
    with pytest.raises(ModelFileError, match=r"3 file\(s\) differ") as told:
        convert.main(["--verify", str(folder)])
    for named in ("tokenizer.json: missing", "extra.txt: not in the manifest", ".safetensors: its content is not"):
        assert named in str(told.value)


REFUSED: dict[str, tuple[Callable[[Path], list[str]], type[FastgenError], str]] = {
    "an output folder that exists": (lambda old: ["--out", str(old)], UsageError, "exists already"),
    "a folder of someone else": (
        lambda old: ["--out", str(old.parent), "--overwrite"], UsageError, "never replaced",
    ),
    "a model that is quantized already": (
        lambda old: ["--model", str(old), "--out", str(old.parent / "new")], UsageError, "quantized already",
    ),
    "no output folder": (lambda old: [], UsageError, "--out"),
    "a rule that names nothing": (
        lambda old: ["--out", str(old.parent / "new"), "--keep", "layers.99=bf16"], UsageError, "layers.99",
    ),
    "an output folder inside the model": (
        lambda old: ["--model", str(old), "--out", str(old / "new")], UsageError, "the model's own folder",
    ),
    "rules that leave nothing": (
        lambda old: ["--out", str(old.parent / "new"), "--keep", "*=bf16"], UsageError, "leaves nothing to quantize",
    ),
    "a text that is not there": (
        lambda old: ["--out", str(old.parent / "new"), "--measure", "none.txt"], ModelFileError, "none.txt",
    ),
    "a text that is empty": (
        lambda old: ["--out", str(old.parent / "new"), "--measure", os.devnull], UsageError, "at least two",
    ),
    "a window of one token": (
        lambda old: ["--out", str(old.parent / "new"), "--measure", __file__, "--window", "1"], UsageError, "--window",
    ),
    "no step between windows": (
        lambda old: ["--out", str(old.parent / "new"), "--measure", __file__, "--stride", "0"], UsageError, "--stride",
    ),
    "fewer than no tokens": (
        lambda old: ["--out", str(old.parent / "new"), "--measure", __file__, "--max-tokens", "-5"], UsageError, "-5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_mistakes_are_told_before_any_work_and_nothing_is_lost(
    folder: Path, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quantize.folder.write_folder", None)
    arguments, error, words = REFUSED[mistake]
    with pytest.raises(error, match=words):
        main(["--model", "stories", "--quant", "int4", *arguments(folder)])
    assert not verify_manifest(folder)
    assert sorted(os.listdir(folder.parent)) == ["copy"]


@pytest.mark.parametrize(
    ("flags", "word"), [(["--method", "magic"], "magic"), (["--symmetric", "--asymmetric"], "not allowed with")]
)
def test_unknown_methods_and_contradictions_are_usage_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture, flags: list[str], word: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--quant", "int4", "--out", str(tmp_path / "x"), *flags])
    assert ended.value.code == 2
    assert word in capsys.readouterr().err


def test_a_full_disk_is_known_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=100_000))
    with pytest.raises(CapacityError, match="nothing was written"):
        main(["--model", "stories", "--quant", "int4", "--out", str(tmp_path / "x")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, tensor: str, value: float) -> None:
    source = Path(shutil.copytree(resolve("stories"), tmp_path / "source"))
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    tensors[tensor].view(-1)[7] = value
    save_file(tensors, file, metadata={"format": "pt"})
    ours = "w_gate_up" if "mlp" in tensor else "norm.weight"
    with pytest.raises(ModelFileError, match=ours):
        main(["--model", str(source), "--quant", "int4", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        file = folder / index["weight_map"].pop(name)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        tensors = load_file(file)
        del tensors[name]
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def reshaped(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]
        tensors = load_file(file)
        tensors[name] = change(tensors[name]).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def described(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return damage


Q = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no scale": (without(f"{Q}.weight_scale"), "missing tensors .*q_proj.weight_scale"),
    "no zero point": (without(f"{Q}.weight_zero_point"), "missing tensors .*q_proj.weight_zero_point"),
    "no packed weight": (without(f"{Q}.weight_packed"), "missing tensors .*q_proj.weight_packed"),
    "a narrow scale": (reshaped(f"{Q}.weight_scale", lambda t: t[:, :1]), "weight_scale is .* where .* is expected"),
    "a float packed weight": (reshaped(f"{Q}.weight_packed", lambda t: t.float()), "weight_packed is .*"),
    "another method": (described(lambda c: c.update(quant_method="bitsandbytes")), "'bitsandbytes'"),
    "another format": (described(lambda c: c.update(format="nvfp4-pack-quantized")), "nvfp4"),
    "three bits": (described(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3)), "'num_bits': 3"),
    "bits that are no number": (
        described(lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=[4])), "num_bits",
    ),
    "an order of activation": (
        described(lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group")), "weight_g_idx",
    ),
    "quantized activations": (
        described(lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8})), "activations",
    ),
    "no groups": (described(lambda c: c.pop("config_groups")), "config_groups"),
    "targets that are no list": (
        described(lambda c: c["config_groups"]["group_0"].update(targets="Linear")), "targets",
    ),
    "a pattern that would not end": (
        described(lambda c: c["config_groups"]["group_0"].update(targets=["re:(a+)+$"])), "pattern",
    ),
    "a pattern that would take hours": (
        described(lambda c: c["config_groups"]["group_0"].update(targets=["re:" + ".*" * 12 + "!"])), "4 repeats",
    ),
    "parts of one linear that differ": (
        described(lambda c: c["ignore"].append(Q)), "missing tensors .*q_proj.weight\n",
    ),
    "a quantized cache": (described(lambda c: c.update(kv_cache_scheme={"num_bits": 8})), "kv_cache_scheme"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_quantized_folder_is_a_typed_error(folder: Path, damage: str) -> None:
    change, words = DAMAGES[damage]
    change(folder)
    with pytest.raises(ModelFileError, match=words):
        load_model(folder, device="cpu")
    assert verify_manifest(folder), "the manifest knows, too"


def test_a_flag_that_contradicts_the_folder_is_refused(folders: dict[str, Path]) -> None:
    assert load_model(folders["int4"], quant="int4", device="cpu").format.startswith("int4-g128-asym")
    for other in ({"quant": "int8"}, {"quant": "int4", "symmetric": True}, {"quant": "int4", "keep": "lm_head=bf16"}):
        with pytest.raises(UsageError, match="quantized already"):
            load_model(folders["int4"], device="cpu", **other)
    for flag, alone in (("keep", "lm_head=bf16"), ("group-size", 64), ("symmetric", True)):
        with pytest.raises(UsageError, match=f"--{flag}: only with --quant"):
            load_model(folders["int4"], device="cpu", **{flag.replace("-", "_"): alone})


def test_verify_names_what_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> dict[str, object]:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("fastgen.manifest._entry", refuse)
    assert "config.json: cannot be read: Permission denied" in verify_manifest(folder)


@pytest.mark.parametrize("mode", [0o755, 0o555])
def test_overwriting_replaces_a_folder_of_ours(folder: Path, mode: int) -> None:
    folder.chmod(mode)
    assert main(["--model", "stories", "--quant", "int8", "--out", str(folder), "--overwrite"]) == 0
    assert load_model(folder, device="cpu").format == "int8"
    assert (folder / NAME).exists()
    assert sorted(os.listdir(folder.parent)) == ["copy"]
