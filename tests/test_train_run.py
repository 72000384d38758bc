"""The train command: what it refuses before it begins, what it writes, and what it goes on with."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from fastgen.errors import CapacityError, FastgenError, ModelFileError, RankLostError, UsageError
from fastgen.load import load_model
from fastgen.manifest import verify_manifest
from fastgen.tokenizer.open import open_tokenizer
from fastgen.train import main
from fastgen.training.curve import can_draw
from fastgen.training.lock import sole_run
from fastgen.training.ranks import Ranks, told_once
from fastgen.training.run import Run
from fastgen.training.tokens import read_token_file, write_token_file
from fastgen.training.trainer import Trainer
from fastgen.training.vocabulary import train_tokenizer, write_tokenizer
from tests.training_runs import TEXT, document, flags, interrupt, without

STATE = "training_state.safetensors"


pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_run_leaves_a_model_a_curve_and_samples_on_the_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("fastgen.training.run_folder.can_draw", can_draw)
    assert main(flags(tmp_path, "--sample-every", "4")) == 0
    err = capsys.readouterr().err
    samples = [line.split(" writes: ") for line in err.splitlines() if " writes: " in line]
    assert [when.split(";")[0] for when, _ in samples] == ["step 4", f"saved in {tmp_path / 'out'}"]
    assert all(text for _, text in samples)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model",
        "tokenizer_config.json", "training.json", "loss.png", "fastgen-manifest.json",
    }  # fmt: skip
    picture = (tmp_path / "out" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    assert not verify_manifest(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def test_without_sample_every_only_the_end_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(tmp_path)) == 0
    assert capsys.readouterr().err.count(" writes: ") == 1


@pytest.mark.parametrize("form", ["folder", "tokenizer.json", "tokenizer.model"])
def test_the_output_has_the_tokenizer_that_a_flag_names(tmp_path: Path, form: str) -> None:
    folder = tmp_path / "words"
    folder.mkdir()
    write_tokenizer(folder, train_tokenizer([TEXT], 290))
    source = folder if form == "folder" else folder / form
    assert main([*without(flags(tmp_path), "--train-tokenizer"), "--tokenizer", str(source)]) == 0
    model = load_model(tmp_path / "out", device="cpu")
    assert model.tokenizer.encode(TEXT) == open_tokenizer(folder).encode(TEXT)
    assert model.config.eos_token_ids == (2,)


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_the_output_has_the_tokenizer_of_a_gguf_that_it_was_trained_on_from(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("gguf")
    from tests.checkpoint_writers import LLAMA, make_model, write_gguf
    from tests.vocabularies import byte_level_as_gguf, sentencepiece_as_gguf, small_byte_level, small_sentencepiece

    words = byte_level_as_gguf(small_byte_level(), "gpt-2")
    if kind == "sentencepiece":
        words = sentencepiece_as_gguf(sentencepiece.SentencePieceProcessor(model_proto=small_sentencepiece()))
        words |= {"llama.vocab_size": None}
    config = LLAMA | {"vocab_size": len(words["tokenizer.ggml.tokens"])}  # type: ignore[arg-type]
    source = write_gguf(tmp_path / "model.gguf", config, make_model(config), metadata=words)
    plain = without(without(flags(tmp_path), "--train-tokenizer"), "--shape")
    assert main([*plain, "--init-from", str(source)]) == 0
    expected = load_model(source, device="cpu").tokenizer
    assert load_model(tmp_path / "out", device="cpu").tokenizer.encode(TEXT) == expected.encode(TEXT)


def test_tokens_alone_make_a_model_that_can_be_trained_on_and_take_a_tokenizer_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [*flags(tmp_path), "--save-tokens", str(tmp_path / "tokens.bin")]
    assert main(whole) == 0
    shutil.move(tmp_path / "out", tmp_path / "whole")
    plain = without(without(without(flags(tmp_path), "--train-tokenizer"), "--text"), "--shape")
    plain += ["--tokens", str(tmp_path / "tokens.bin")]
    assert main([*plain, "--shape", "dim=32,layers=1,heads=2,vocab-size=290"]) == 0
    assert "it has no tokenizer; later commands take one with --tokenizer" in capsys.readouterr().err
    for flag, name in (("--init-from", "more"), ("--distill-from", "draft")):
        shape = [] if flag == "--init-from" else ["--shape", "dim=16,layers=1,heads=2"]
        words = [*plain, *shape, flag, str(tmp_path / "out"), "--out", str(tmp_path / name)]
        assert main([*words, "--tokenizer", str(tmp_path / "whole")]) == 0
        assert load_model(tmp_path / name, device="cpu").tokenizer.vocab_size == 290
    assert load_model(tmp_path / "out", tokenizer=tmp_path / "whole", device="cpu").tokenizer.vocab_size == 290


def test_models_whose_ids_mean_different_things_cannot_be_mixed(tmp_path: Path) -> None:
    assert main(flags(tmp_path)) == 0
    model, other = tmp_path / "out", Path(shutil.copytree(tmp_path / "out", tmp_path / "other"))
    write_tokenizer(other, train_tokenizer(["Seven brown foxes jump over lazy zebras in the park.\n"], 290))
    plain = [*without(without(flags(tmp_path), "--train-tokenizer"), "--shape"), "--out", str(tmp_path / "more")]
    message = r"and --{} have different tokenizers: token 259 is b'.+' in the first, b'.+' in the second"
    with pytest.raises(UsageError, match=message.format("init-from")):
        main([*plain, "--tokenizer", str(other / "tokenizer.model"), "--init-from", str(model)])
    with pytest.raises(UsageError, match=message.format("distill-from")):
        main([*plain, "--init-from", str(model), "--distill-from", str(other)])
    assert main([*plain, "--tokenizer", str(model / "tokenizer.model"), "--init-from", str(model)]) == 0


def test_a_place_that_cannot_be_written_is_found_before_anything_is_read(tmp_path: Path) -> None:
    words = flags(tmp_path)
    words[words.index("--text") + 1] = str(tmp_path / "missing.txt")
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UsageError, match=r"--out .*out: cannot be written"):
            main([*words, "--out", str(place)])


def test_two_runs_cannot_have_one_folder_and_a_dead_ones_lock_binds_nobody(tmp_path: Path) -> None:
    with sole_run(tmp_path / "out"), pytest.raises(UsageError, match="another run is writing it"):
        main(flags(tmp_path))
    (tmp_path / ".out.lock").write_text("")
    assert main(flags(tmp_path)) == 0
    assert not (tmp_path / ".out.lock").exists()


def test_what_others_put_into_the_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(flags(tmp_path), 2, monkeypatch)
    out = tmp_path / "out"
    (out / "notes.txt").write_text("years of work")
    (out / "logs" / "deep").mkdir(parents=True)
    (out / "logs" / "deep" / "events").write_text("1 2 3")
    (out / "latest").symlink_to("notes.txt")
    assert main([*flags(tmp_path), "--resume"]) == 0
    assert (out / "notes.txt").read_text() == (out / "latest").read_text() == "years of work"
    assert (out / "logs" / "deep" / "events").read_text() == "1 2 3"
    assert verify_manifest(out) == [f"{name}: not in the manifest" for name in ("latest", "logs", "notes.txt")]


def test_saved_tokens_replace_nothing_but_tokens(tmp_path: Path) -> None:
    words, text, tokens = flags(tmp_path), tmp_path / "text.txt", tmp_path / "tokens.bin"
    with pytest.raises(UsageError, match=r"--save-tokens .*text.txt: exists and is no token file"):
        main([*words, "--save-tokens", str(text)])
    assert text.read_text() == TEXT
    with pytest.raises(UsageError, match="is the folder --out"):
        main([*words, "--save-tokens", str(tmp_path / "out")])
    with pytest.raises(ModelFileError, match="too short"):
        main([*words, "--save-tokens", str(tokens), "--context", "4000"])
    with pytest.raises(UsageError, match="--dtype fp16"):
        main([*words, "--save-tokens", str(tokens), "--dtype", "fp16"])
    assert not tokens.exists(), "nothing is written before everything was checked"
    write_token_file(tokens, np.arange(3, dtype=np.uint16))
    assert main([*words, "--save-tokens", str(tokens)]) == 0
    tokenizer = open_tokenizer(tmp_path / "out")
    assert read_token_file(tokens).tolist() == [*tokenizer.encode(TEXT.strip()), 2]


def test_a_quantized_model_cannot_be_trained_on_but_can_be_followed(tmp_path: Path) -> None:
    from quantize.run import main as quantize

    assert main(flags(tmp_path)) == 0
    target = tmp_path / "int8"
    assert quantize(["--model", str(tmp_path / "out"), "--quant", "int8", "--out", str(target), "--device", "cpu"]) == 0
    plain = [*without(without(flags(tmp_path), "--train-tokenizer"), "--shape"), "--out", str(tmp_path / "more")]
    with pytest.raises(UsageError, match=r"--init-from .*int8: is quantized; give the model that it was made from"):
        main([*plain, "--init-from", str(target)])
    assert main([*plain, "--shape", "dim=16,layers=1,heads=2", "--distill-from", str(target)]) == 0


def test_the_folder_of_a_run_generates_and_can_be_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = flags(tmp_path)
    first = document([*words, "--save-tokens", str(tmp_path / "tokens.bin")], capsys)
    model = load_model(tmp_path / "out", device="cpu", dtype="fp32")
    assert model.tokenizer.vocab_size == model.config.vocab_size == 290
    assert model.config.eos_token_ids == (2,) and model.config.max_seq_len == 16
    more = words[words.index("--context") :]
    more = [*more, "--tokens", str(tmp_path / "tokens.bin"), "--out", str(tmp_path / "more")]
    second = document([*more, "--init-from", str(tmp_path / "out")], capsys)
    assert second["losses"][0] < first["losses"][0]
    draft = [*more, "--shape", "dim=16,layers=1,heads=2", "--out", str(tmp_path / "draft")]
    third = document([*draft, "--distill-from", str(tmp_path / "out")], capsys)
    assert 0 <= third["validations"][-1]["agreement"] <= 1
    assert load_model(tmp_path / "draft", device="cpu").tokenizer.vocab_size == 290


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (["--context", "4000"], ModelFileError, "too short.*each needs 4001"),
        (["--tokenizer", "x"], UsageError, "two tokenizers"),
        (["--tokens", "x"], UsageError, "either --text FILE... or --tokens"),
        (["--config", "x"], UsageError, "each say what the model is"),
        (["--validation", "1"], UsageError, "--validation 1.0"),
        (["--batch-size", "5", "--accumulate", "2"], UsageError, "--accumulate 2"),
        (["--save-every", "0"], UsageError, "--save-every 0"),
        (["--train-tokenizer", "100"], UsageError, "--train-tokenizer 100"),
        (["--text", "missing.txt"], ModelFileError, "missing.txt"),
        (["--shape", "dim=32,layers=2,heads=4"], UsageError, "each say what the model is"),
    ],
)
def test_flags_that_cannot_be_honoured_are_refused(
    tmp_path: Path, change: list[str], kind: type[FastgenError], message: str
) -> None:
    words = flags(tmp_path)
    with pytest.raises(kind, match=message):
        main([*words, *change])
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    words = flags(tmp_path)
    words[words.index("--shape") + 1] += ",vocab-size=100"
    with pytest.raises(ModelFileError, match=r"290 ids, the model's embedding 100"):
        main(words)


def test_tokens_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    write_token_file(tmp_path / "tokens.bin", np.full(1000, 500, np.uint16))
    with pytest.raises(ModelFileError, match=r"tokens.bin: token 500 at place 0 .* vocabulary of 300"):
        main([
            "--tokens", str(tmp_path / "tokens.bin"), "--shape", "dim=32,layers=1,heads=2,vocab-size=300",
            "--context", "16", "--device", "cpu", "--out", str(tmp_path / "out"),
        ])  # fmt: skip


def test_a_target_with_another_vocabulary_cannot_be_followed(tmp_path: Path) -> None:
    words = flags(tmp_path)
    main(words)
    tokens = tmp_path / "tokens.bin"
    write_token_file(tokens, np.full(1000, 5, np.uint16))
    with pytest.raises(UsageError, match="its vocabulary has 290 tokens, the model's 300"):
        main([
            "--tokens", str(tokens), "--shape", "dim=32,layers=1,heads=2,vocab-size=300", "--context", "16",
            "--distill-from", str(tmp_path / "out"), "--device", "cpu", "--out", str(tmp_path / "draft"),
        ])  # fmt: skip


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    words = flags(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"out: exists; name another folder"):
        main(words)
    assert (tmp_path / "out" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["--learning-rate", "3e38", "--warmup", "0"], UsageError, r"--learning-rate 3e\+38: expected .* up to 1e30"),
        (["--weight-decay", "1e300"], UsageError, r"--weight-decay 1e\+300"),
        (["--distill-temperature", "2"], UsageError, "--distill-temperature: only with --distill-from"),
    ],
)
def test_numbers_without_a_meaning_are_refused(
    tmp_path: Path, more: list[str], kind: type[FastgenError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        main(flags(tmp_path, *more))
    assert not (tmp_path / "out").exists()


def test_what_the_memory_cannot_hold_is_known_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.device.free_memory", lambda device: 1_000_000)
    words = flags(tmp_path)
    words[words.index("--shape") + 1] = "dim=128,layers=2,heads=4"
    with pytest.raises(CapacityError, match=r"training this model needs 0.0 GB.*\nUse a smaller --shape"):
        main(words)


def test_a_validation_share_above_the_most_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("tokens", "run"):
        monkeypatch.setattr(f"fastgen.training.{module}.MAX_VALIDATION_TOKENS", 40)
    assert main(flags(tmp_path)) == 0
    assert "(and 40 to measure on, the most)" in capsys.readouterr().err


def test_the_weights_after_the_last_update_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Trainer.advance

    def ruined(self: Trainer, until: int) -> None:
        advance(self, until)
        with torch.no_grad():
            self.model.norm.weight[0] = torch.inf

    monkeypatch.setattr(Trainer, "advance", ruined)
    with pytest.raises(UsageError, match=r"step 2: the validation loss is nan: .*diverged\nLower.*\nNothing was"):
        main([*flags(tmp_path), "--steps", "2"])
    with pytest.raises(UsageError, match=r"step 1: the weights or their loss are no longer finite.*\n.*\nNothing was"):
        main([*flags(tmp_path), "--save-every", "1"])
    assert not (tmp_path / "out").exists()


def test_ctrl_c_in_the_last_sample_leaves_a_finished_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Run) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        main(flags(tmp_path))
    assert f"interrupted at step 6. The finished model is in {tmp_path / 'out'}" in capsys.readouterr().err
    assert load_model(tmp_path / "out", device="cpu").config.n_layers == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2", "RANK": "0"}, "no MASTER_ADDR and no MASTER_PORT\nStart with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK=2, WORLD_SIZE=2, LOCAL_RANK=0: expected what torchrun sets"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two, .*expected what torchrun sets, numbers"),
    ],
)
def test_an_environment_that_torchrun_does_not_make_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        main(flags(tmp_path))


def test_one_process_speaks_for_all(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "fastgen.train",
         *flags(tmp_path, "--tokenizer", "x")],
        capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode and done.stderr.count("fastgen.train: --train-tokenizer and --tokenizer name two") == 1


def test_of_many_processes_that_fail_the_first_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgen.training.ranks.LINGER", 0.0)
    store = torch.distributed.HashStore()
    with pytest.raises(UsageError, match="no text"), told_once(store):
        raise UsageError("no text")
    with pytest.raises(SystemExit) as ended, told_once(store):
        raise CapacityError("no memory")
    assert ended.value.code == CapacityError.exit_status


def test_a_process_that_is_gone_is_named_and_other_errors_are_not_mistaken_for_it() -> None:
    with pytest.raises(RankLostError, match="process 1: another process of the run is gone"), Ranks(1, 2, 1).watched():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Connection closed by peer [127.0.0.1]:30595")
    with pytest.raises(RuntimeError, match="shapes"), Ranks(1, 2, 1).watched():
        raise RuntimeError("shapes do not match")


def test_memory_that_runs_out_in_a_step_says_what_to_lower_and_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = Trainer.advance

    def greedy(self: Trainer, until: int) -> None:
        if self.step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        advance(self, until)

    monkeypatch.setattr(Trainer, "advance", greedy)
    with pytest.raises(
        CapacityError, match=r"out of memory on cpu after step 2.*\nUse a higher --acc.*\nThe run as of"
    ):
        main(flags(tmp_path))
