"""`fastgen.generate` and `fastgen.bench` as their users meet them: what is printed where, and how mistakes end."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastgen import bench, cli, generate
from fastgen.errors import FastgenError, ModelFileError, UsageError
from tests.checkpoint_writers import LLAMA, make_model, write_hf
from tests.vocabularies import small_sentencepiece

CONFIG = LLAMA | {"vocab_size": 512, "max_position_embeddings": 256}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An HF folder with random weights, a SentencePiece vocabulary and a ChatML template."""
    path = write_hf(tmp_path_factory.mktemp("hf") / "model", CONFIG, make_model(CONFIG))
    (path / "tokenizer.model").write_bytes(small_sentencepiece())
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return path


def run(folder: Path, *flags: str) -> int:
    return generate.main(
        ["--model", str(folder), "--max-new-tokens", "8", "--device", "cpu", "--dtype", "fp32", *flags]
    )


def test_the_text_goes_to_stdout_and_the_figures_to_stderr(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder, "--prompt", "hello", "--ignore-eos", "--echo") == 0
    out, err = capsys.readouterr()
    assert out.startswith("hello")
    for figure in ("load", "prompt", "decode", "bandwidth", "memory", "tok/s", "ms/token"):
        assert figure in err and figure not in out


@pytest.mark.parametrize(("flags", "count"), [((), "4M"), (("--quant", "int8"), "5M"), (("--quant", "int4"), "5M")])
def test_weights_are_counted_whatever_their_format(
    flags: tuple[str, ...], count: str, capsys: pytest.CaptureFixture
) -> None:
    """4,427,520 weights, and 2,048 x 256 more where the head is quantized, and so no longer the embedding."""
    assert generate.main(["--model", "stories", "--device", "cpu", "--max-new-tokens", "1", *flags]) == 0
    assert f": {count} parameters" in capsys.readouterr().err


def test_json_is_one_documented_line(folder: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(folder, "--prompt", "hello", "--ignore-eos", "--json", "--num-samples", "2", "--temperature", "1") == 0
    (line,) = capsys.readouterr().out.splitlines()
    document = json.loads(line)
    assert document["schema_version"] == 1
    assert document["config"]["max_new_tokens"] == 8
    assert len(document["samples"]) == 2
    for sample in document["samples"]:
        assert sample["prompt"] == "hello" and sample["finish_reason"] == "length"
        assert len(sample["tokens"]) == 8
    assert document["samples"][0]["tokens"] != document["samples"][1]["tokens"]
    metrics = document["metrics"]
    assert metrics["new_tokens"] == 16 and metrics["batch"] == 2 and metrics["decode_tokens_per_second"] > 0
    assert set(metrics["ms_per_token"]) == {"median", "p10", "p90"}
    assert 0 < metrics["share_of_limit"] < 1.5


def test_prompts_come_from_flags_files_and_stdin_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("hello\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n")))
    texts = []
    for flags in (["--prompt", "hello"], ["--prompt-file", str(tmp_path / "prompt")], ["--prompt", "-"]):
        run(folder, *flags, "--ignore-eos")
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]


def test_gpt_fasts_flag_names_are_understood(folder: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--checkpoint_path", str(folder), "--max_new_tokens", "4", "--num_samples", "2", "--top_k=5", "--json"]
    assert generate.main([*flags, "--device", "cpu", "--temperature", "0.8"]) == 0
    config = json.loads(capsys.readouterr().out)["config"]
    assert (config["model"], config["max_new_tokens"], config["num_samples"], config["top_k"]) == (str(folder), 4, 2, 5)


def test_a_chat_is_put_into_the_models_template(folder: Path, capsys: pytest.CaptureFixture) -> None:
    run(folder, "--chat", "--system", "be", "--prompt", "hello", "--json")
    chat = json.loads(capsys.readouterr().out)["samples"][0]["prompt_tokens"]
    run(folder, "--prompt", "[system]be[user]hello", "--json")
    plain = json.loads(capsys.readouterr().out)["samples"][0]["prompt_tokens"]
    assert chat == plain[1:], "the template decides about the beginning-of-sequence token"


def test_underscores_are_accepted_in_flags_and_kept_in_values(folder: Path, capsys: pytest.CaptureFixture) -> None:
    prompt = "--- a/my_file.py"
    assert run(folder, "--prompt=" + prompt, "--ignore_eos", "--json") == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["prompt"] == prompt


def test_ctrl_c_before_the_first_token_reports_no_speeds(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.steps import Steps

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Steps, "prefill", interrupted)
    assert run(folder, "--prompt", "hello", "--json") == 130
    out, err = capsys.readouterr()
    metrics = json.loads(out)["metrics"]
    assert metrics["prefill_tokens_per_second"] is metrics["time_to_first_token_seconds"] is None
    assert "not finished" in err


def test_ctrl_c_keeps_the_text_so_far_and_ends_with_130(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastgen.engine import Engine

    whole = Engine.stream

    def interrupted(self: Engine, *arguments: object, **options: object) -> object:
        for number, piece in enumerate(whole(self, *arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(Engine, "stream", interrupted)
    assert run(folder, "--prompt", "hello", "--ignore-eos", "--json") == 130
    document = json.loads(capsys.readouterr().out)
    assert document["samples"][0]["finish_reason"] == "interrupted"
    assert len(document["samples"][0]["tokens"]) == 4, "the fourth had come, and was never shown"
    assert document["metrics"]["new_tokens"] == 4


def test_a_profile_is_a_trace_of_the_generation(folder: Path, tmp_path: Path) -> None:
    assert run(folder, "--profile", str(tmp_path / "trace.json")) == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("scaled_dot_product_attention" in event.get("name", "") for event in events)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tempature", "1"], "unrecognized.*did you mean --temperature"),
        (["--quant", "int3"], "--quant.*int3.*int8"),
        (["--max-new-tokens", "x"], "--max-new-tokens.*'x'"),
        (["--kv-cache", "int8"], "--kv-cache: not built yet"),
    ],
)
def test_usage_errors_are_one_line_and_end_with_2(
    flags: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.main(flags)
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert not out and err.count("\n") == 1
    assert re.search(message, err)


@pytest.mark.parametrize(
    ("flags", "kind", "message"),
    [
        (["--device", "cuda"], UsageError, "--device cuda: .*--device cpu"),
        (["--device", "tpu"], UsageError, "--device tpu"),
        (["--temperature", "-1"], UsageError, "--temperature -1"),
        (["--speculate", "3"], UsageError, "--speculate: only with a --draft"),
        (["--top-p", "1.5"], UsageError, "--top-p 1.5"),
        (["--num-samples", "0"], UsageError, "--num-samples 0"),
        (["--max-new-tokens", "0"], UsageError, "--max-new-tokens 0"),
        (["--max-seq-len", "9999"], UsageError, "--max-seq-len 9999.*256"),
        (["--system", "x"], UsageError, "--system: only with --chat"),
        (["--prompt", "word " * 400], UsageError, "prompt has .* tokens, the context holds 256"),
        (["--model", "/nowhere/at/all"], ModelFileError, "/nowhere/at/all: no such file"),
        (["--tokenizer", "/nowhere"], ModelFileError, "/nowhere"),
        (["--fail-on-recompile"], UsageError, "--fail-on-recompile: only with --compile"),
        (["--profile", "/nowhere/trace"], UsageError, "--profile /nowhere/trace: .* no folder /nowhere"),
        (["--profile", "/"], UsageError, "--profile /: .* no regular file"),
        (["--prompt-file", "/nowhere"], ModelFileError, "--prompt-file /nowhere"),
    ],
)
def test_mistakes_name_the_value_and_the_way_out(
    folder: Path, flags: list[str], kind: type[FastgenError], message: str
) -> None:
    base = ["--model", str(folder), "--device", "cpu"]
    import torch

    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(kind, match=message) as caught:
        generate.main([*base, *flags])
    assert len(str(caught.value).splitlines()) <= 3


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    small = CONFIG | {"vocab_size": 100}
    path = write_hf(tmp_path / "small", small, make_model(small))
    with pytest.raises(ModelFileError, match=r"\d+ ids, the model's embedding 100 rows"):
        generate.main(["--model", str(path), "--tokenizer", str(folder / "tokenizer.model"), "--device", "cpu"])


@pytest.mark.parametrize(("error", "status"), [(UsageError, 2), (ModelFileError, 3)])
def test_a_command_ends_with_its_errors_status_and_no_traceback(
    error: type[FastgenError], status: int, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)

    def command() -> int:
        raise error("what, where, how")

    with pytest.raises(SystemExit) as stop:
        cli.run(command, prog="test")
    assert stop.value.code == status
    assert capsys.readouterr().err == "test: what, where, how\n"


def test_help_and_usage_errors_never_import_torch() -> None:
    """They answer in under 0.3 s; torch alone takes longer."""
    script = (
        "import sys; from fastgen import generate\n"
        "try: generate.main([sys.argv[1]])\n"
        "except SystemExit as stop: assert stop.code == int(sys.argv[2]), stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    for flag, status in (("--help", "0"), ("--nonsense", "2")):
        subprocess.run([sys.executable, "-c", script, flag, status], check=True, capture_output=True)


def test_bench_records_a_speed_beside_its_limit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "records.json"
    flags = ["--shape", "stories15m", "--modes", "eager", "--new-tokens", "8", "--repeats", "2"]
    assert bench.main([*flags, "--device", "cpu", "--dtype", "fp32", "--json", "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (record,) = json.loads(lines[-1])["records"]
    assert json.loads(output.read_text())["records"] == [record]
    # 6 layers of 4 x 288 x 288 + 3 x 288 x 768, 13 norms, and the tied head, in fp32.
    assert record["weight_bytes"] == 4 * (6 * (4 * 288 * 288 + 3 * 288 * 768) + 13 * 288 + 32000 * 288)
    assert record["kv_bytes"] == 4 * 2 * 6 * 288 * (5 + 8 // 2), "half of the new tokens stand there on average"
    assert record["model"] == "stories15m" and record["format"] == "fp32" and record["world_size"] == 1
    rate = 1e3 / record["ms_per_token"]["median"]
    assert record["decode_tokens_per_second"] == pytest.approx(rate)
    moved = (record["weight_bytes"] + record["kv_bytes"]) * rate / 1e9
    assert record["share_of_limit"] == pytest.approx(moved / record["read_limit_gb_per_second"])
    assert record["weight_bytes"] < record["peak_memory_bytes"] < 1 << 36
    assert "stories15m" in lines[1]


def test_a_baseline_that_cannot_be_compared_is_refused_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fastgen.benchmark.time_engine", None)
    with pytest.raises(UsageError, match="plain weights only, not int8"):
        bench.main(["--shape", "stories15m", "--quant", "int8", "--baseline", "transformers", "--device", "cpu"])


@pytest.mark.parametrize(
    "flags",
    [
        ["--shape", "gpt-5"],
        ["--modes", "warp"],
        ["--batch", "0"],
        ["--output", "/nowhere/records.json"],
        ["--output", "/"],
        ["--output", os.devnull],
        ["--baseline", "transformers", "--batch", "2"],
        ["--max-seq-len", "9"],
        ["--tokenizer", "x", "--shape", "stories15m"],
    ],
)
def test_bench_refuses_what_it_cannot_measure(flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0]):
        bench.main(flags)
