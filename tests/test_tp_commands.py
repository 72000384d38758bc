"""The commands under torchrun: rank 0 alone prints, and what comes of them is what one process makes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quantize.run import main as quantize
from tests.torchrun import ENVIRONMENT, PORT

FP32 = ("--dtype", "fp32")
"""In which ranks give what one process does: a sum over bf16 numbers depends on who adds what."""


def run(module: str, *flags: str, world: int = 2, text: str = "") -> str:
    """Return what a command prints on CPUs; with `world` 1 it is started without torchrun."""
    launcher = ["torch.distributed.run", "--nproc-per-node", str(world), "--master-port", PORT, "-m"]
    command = [sys.executable, "-m", *(launcher if world > 1 else []), module, "--device", "cpu", *flags]
    done = subprocess.run(
        command, input=text, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=120
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_line(printed: str) -> dict[str, Any]:
    """The JSON document at the end, of which there is one."""
    documents = [line for line in printed.splitlines() if line.startswith("{")]
    assert documents == [printed.splitlines()[-1]]
    return json.loads(documents[0])


def test_bench_measures_all_ranks_and_compares_them() -> None:
    shape = ["--shape", "stories15m", "--modes", "eager", "--new-tokens", "3", "--repeats", "1"]
    (record,) = last_line(run("fastgen.bench", *shape, "--check-ranks", "--json"))["records"]
    assert record["world_size"] == 2 and record["decode_tokens_per_second"] > 0


def test_quantize_run_writes_the_folder_that_one_process_writes(tmp_path: Path) -> None:
    flags = ["--model", "stories-draft", "--quant", "int8", "--out"]
    assert run("quantize.run", *flags, str(tmp_path / "two")).count("written to") == 1
    assert quantize([*flags, str(tmp_path / "one"), "--device", "cpu"]) == 0
    one, two = (
        {file.name: file.read_bytes() for file in (tmp_path / name).glob("model*")} for name in ("one", "two")
    )  # fmt: skip
    assert one == two != {}


@pytest.mark.long
def test_evaluate_finds_the_perplexity_that_one_process_finds(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Once upon a time there was a girl. " * 12)
    flags = ["--text", str(tmp_path / "text"), "--json", *FP32]
    found = last_line(run("fastgen.evaluate", *flags, "--check-ranks"))
    alone = last_line(run("fastgen.evaluate", *flags, world=1))
    assert found["scores"]["perplexity"] == pytest.approx(alone["scores"]["perplexity"], rel=1e-4)


@pytest.mark.long
def test_chat_reads_what_rank_0_is_told_and_gives_the_answer_of_one_process() -> None:
    flags = ["--model", "smollm2", "--max-new-tokens", "6", *FP32]
    answer = run("fastgen.chat", *flags, "--check-ranks", text="Hi\n")
    assert answer == run("fastgen.chat", *flags, world=1, text="Hi\n") != ""


def test_speculation_gives_the_text_of_one_process() -> None:
    flags = ["--max-new-tokens", "24", *FP32]
    speculated = run("fastgen.generate", *flags, "--draft", "embedded", "--speculate", "3", "--check-ranks")
    assert speculated == run("fastgen.generate", *flags, world=1)
