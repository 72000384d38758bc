"""The doctor finds what is wrong with a machine, and its costs are those of the models themselves."""

import json
import subprocess
import sys
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from torch._inductor import config as inductor

from fastgen import diagnosis
from fastgen.config import ModelConfig
from fastgen.costs import Cost, costs, matrix_bits
from fastgen.diagnosis import FAIL, OK, WARN
from fastgen.doctor import main
from fastgen.errors import ModelFileError, UsageError
from fastgen.model import Transformer
from fastgen.shapes import shape
from tp.plan import make_plan

CPU = torch.device("cpu")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that reads 10 GB/s, and no compile test."""
    monkeypatch.setattr("fastgen.kernels.bandwidth.measure_read_bandwidth", lambda device: 10.0)
    monkeypatch.setattr(diagnosis, "check_compile", lambda device: diagnosis.Finding(OK, "compile", "as said"))


def by_format(rows: list[Cost]) -> dict[str, Cost]:
    return {row.format: row for row in rows}


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "llama-3.2-1b", "stories15m"])
@pytest.mark.parametrize(("weight_format", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_plain_formats_cost_what_the_model_says(name: str, weight_format: str, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        model = Transformer(shape(name)).to(dtype)
    cost = by_format(costs(shape(name)))[weight_format]
    assert cost.read_bytes[1] == model.weight_bytes()
    assert cost.weight_bytes == sum(parameter.numel() * dtype.itemsize for parameter in model.parameters())
    assert cost.kv_bytes_per_token == model.kv_bytes(1)


def test_quantized_matrices_cost_their_codes_and_scales() -> None:
    assert matrix_bits(10, 256, "int8") == 10 * 256 * 8 + 10 * 16
    assert matrix_bits(10, 256, "int4", 128) == 10 * 256 * 4 + 10 * 2 * (16 + 4)
    assert matrix_bits(10, 256, "int4", 32) == 10 * 256 * 4 + 10 * 8 * (16 + 4)


def test_a_width_that_the_group_does_not_divide_takes_a_narrower_one_else_int8() -> None:
    assert matrix_bits(1, 576, "int4", 128) == matrix_bits(1, 576, "int4", 64)
    assert matrix_bits(1, 96, "int4", 256) == matrix_bits(1, 96, "int4", 32)
    assert matrix_bits(1, 172, "int4", 128) == matrix_bits(1, 172, "int8")


def test_llama_2_7b_in_int4_costs_a_quarter_and_its_scales() -> None:
    cost = by_format(costs(shape("llama-2-7b")))["int4"]
    matrices = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 32000 * 4096
    others = 32 * 2 * 4096 + 4096
    assert cost.parameters == 6_738_415_616
    assert cost.weight_bytes == matrices * (4 + 20 / 128) / 8 + (32000 * 4096 + others) * 2
    assert cost.read_bytes[1] == cost.weight_bytes - (32000 - 1) * 4096 * 2
    assert cost.kv_bytes_per_token == 2 * 32 * 4096 * 2


def test_a_quantized_head_of_tied_embeddings_is_a_matrix_of_its_own() -> None:
    tied = by_format(costs(shape("llama-3.2-1b")))["int4"]
    head = 128256 * (2048 * 8 + 16) // 8
    layers = 16 * (2048 * (3072 + 2048 + 3 * 8192)) * (4 + 20 / 128) / 8
    norms = (16 * 2 + 1) * 2048 * 2
    assert tied.weight_bytes == 128256 * 2048 * 2 + head + layers + norms


def test_ranks_share_the_matrices_and_replicate_kv_heads_when_there_are_too_few() -> None:
    plain = {
        "dim": 64, "n_layers": 2, "n_heads": 8, "head_dim": 8, "hidden_dim": 96, "vocab_size": 100, "max_seq_len": 32
    }  # fmt: skip
    many = by_format(costs(ModelConfig(**plain, n_kv_heads=8)))["bf16"].read_bytes
    whole = 5 * 64 + 64  # norms, and one row of the embedding
    assert many[4] == (many[1] - 2 * whole) // 4 + 2 * whole
    few = by_format(costs(ModelConfig(**plain, n_kv_heads=2)))["bf16"].read_bytes
    assert few[4] == (few[1] - 2 * whole) // 4 + 2 * whole + 2 * (2 * 2 * 8 * 2 // 4) * 64


def test_ranks_that_divide_nothing_evenly_cost_what_the_largest_share_does() -> None:
    config = ModelConfig(
        dim=72, n_layers=2, n_heads=3, n_kv_heads=3, head_dim=24, hidden_dim=200, vocab_size=100, max_seq_len=32
    )
    read = by_format(costs(config))["bf16"].read_bytes
    layer = 72 * (3 * 2 * 24 + 2 * 24) + 3 * 72 * 100  # two of three heads, half of the hidden units
    assert read[2] == 2 * (2 * layer + 72 * 50 + 5 * 72 + 72)
    assert read[4] is None, "there are three heads"
    parts = [make_plan(config, {}, 2, rank).local() for rank in range(2)]
    with torch.device("meta"):
        sizes = [Transformer(part).to(torch.bfloat16).weight_bytes() for part in parts]
    assert max(sizes) == read[2]


@pytest.mark.usefixtures("quick")
def test_the_table_of_stories260k_holds_its_known_bytes(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(shared_data / "models/stories260K.bin"), "--device", "cpu"]) == 0
    out, _ = capsys.readouterr()
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.split()}
    assert "0.3M parameters" in out and "KV at 512" in out
    # 260,032 parameters; KV of 5 layers, 4 heads of 8; 10 GB/s over 1,040,128 bytes.
    assert rows["fp32"][:9] == ["fp32", "32.00", "1.04", "MB", "1.28", "kB", "655.36", "kB", "1.70"]
    assert rows["fp32"][10:12] == ["yes", f"{10e9 / 1_040_128:.1f}"]
    assert rows["bf16"][2:4] == ["520.06", "kB"]
    assert rows["bf16"][-3] == f"{10e9 / 520_064:.1f}"
    assert {"int8", "int4"} <= rows.keys()


@pytest.mark.usefixtures("quick")
def test_json_is_the_last_line_and_all_of_stdout(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--model",
        str(shared_data / "models/stories260K.bin"),
        "--device",
        "cpu",
        "--max-seq-len",
        "100",
        "--json",
    ]
    assert main(flags) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert out.count("\n") == 1 and "python" in err
    assert document["model"]["parameters"] == 260_032
    assert [row["format"] for row in document["model"]["formats"]] == ["fp32", "bf16", "int8", "int4"]
    assert document["model"]["formats"][0]["kv_bytes"] == 128_000
    assert document["read_limit_gb_per_second"] == 10.0
    assert {"python", "torch", "triton", "compiler", "cpu", "memory", "bandwidth", "compile"} <= {
        finding["name"] for finding in document["findings"]
    }


@pytest.mark.usefixtures("quick")
def test_a_model_too_large_is_told_with_the_context_that_fits(
    shared_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "available_bytes", lambda device: 600_000)
    main(["--model", str(shared_data / "models/stories260K.bin"), "--device", "cpu"])
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert " no " in rows["fp32"]
    assert f" {(600_000 - 520_064) // 640} tokens " in rows["bf16"]
    assert " yes " in rows["int4"]


@pytest.mark.usefixtures("quick")
def test_without_a_model_only_the_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "tok/s" not in out
    assert {line[:4].strip() for line in out.splitlines()} <= {OK, WARN, ""}


@pytest.mark.usefixtures("quick")
def test_mistakes_are_told_before_anything_is_measured(shared_data: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        main(["--model", "nowhere", "--device", "cpu"])
    with pytest.raises(UsageError, match=r"--max-seq-len 1000.*512"):
        main(["--model", str(shared_data / "models/stories260K.bin"), "--max-seq-len", "1000", "--device", "cpu"])


@pytest.mark.usefixtures("quick")
def test_a_machine_without_a_compiler_fails_with_the_fix(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        assert main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if " compiler " in line)
    assert line.startswith(FAIL)
    assert "fix: apt install g++, or set CXX" in out


@pytest.mark.parametrize(
    ("of_torch", "of_triton", "has_gpu", "status", "fix"),
    [
        ("2.13.0+cpu", "3.7.1", True, OK, ""),
        ("2.14.1", "3.8.2", True, OK, ""),
        ("2.11.0", "3.6.0", True, OK, ""),
        ("2.13.0", "3.7.0", True, FAIL, "pip install 'triton==3.7.1'"),
        ("2.13.0", "3.7.0", False, WARN, "pip install 'triton==3.7.1'"),
        ("2.15.0", "3.8.0", True, FAIL, "pip install 'triton==3.9.*'"),
        ("2.12.0", None, True, FAIL, "pip install 'triton==3.7.0'"),
        ("2.12.0", None, False, OK, ""),
        ("2.99.0", "5.0", True, WARN, "keep the one that pip chose with torch"),
    ],
)
def test_triton_is_the_one_that_torch_pairs_with(
    of_torch: str,
    of_triton: str | None,
    has_gpu: bool,
    status: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", of_torch)
    monkeypatch.setattr(diagnosis, "_installed", lambda package: of_triton)
    finding = diagnosis.check_triton(has_gpu=has_gpu)
    assert (finding.status, finding.fix) == (status, fix)


@pytest.mark.parametrize(("found", "status"), [("2.10.1", FAIL), ("2.11.0", OK), ("2.15.2", OK), ("2.16.0", WARN)])
def test_torch_is_one_that_is_tested(found: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", found)
    assert diagnosis.check_torch().status == status


def test_a_driver_without_a_cuda_build_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(diagnosis, "_driver", lambda: "570.1")
    (finding,) = diagnosis.check_gpus()
    assert finding.status == WARN and "CUDA build" in finding.fix


def test_gpus_are_listed_with_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = namedtuple("properties", "name major minor")
    gpus = [properties("H100", 9, 0), properties("T4", 7, 5), properties("A100", 8, 0)]
    memory = [(80 << 30, 80 << 30), (15 << 30, 16 << 30), (1 << 30, 80 << 30)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpus.__getitem__)
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory.__getitem__)
    monkeypatch.setattr(diagnosis, "_driver", lambda: "570.1")
    findings = diagnosis.check_gpus()
    assert [finding.status for finding in findings] == [OK, WARN, WARN]
    assert "sm_90" in findings[0].text and "driver 570.1" in findings[0].text
    assert "no bf16" in findings[1].text
    assert "nvidia-smi" in findings[2].fix


def test_missing_extras_are_a_warning_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(diagnosis, "version", missing)
    assert {(finding.status, finding.fix) for finding in diagnosis.check_extras()} == {
        (WARN, "pip install 'fastgen[gguf]'"),
        (WARN, "pip install 'fastgen[tiktoken]'"),
    }


def test_caches_are_measured_where_the_environment_puts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(bytes(20_000_000))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "not" / "there"))
    inductor_cache, triton_cache, _ = diagnosis.check_caches()
    assert f"{tmp_path}: 0.02 GB" in inductor_cache.text
    assert f"{tmp_path / 'not' / 'there'}: 0.00 GB" in triton_cache.text


def test_little_memory_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "available total")
    monkeypatch.setattr(diagnosis.psutil, "virtual_memory", lambda: memory(1 << 30, 8 << 30))
    assert diagnosis.check_memory().status == WARN


def test_a_compiler_that_breaks_fails_the_compile_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("no header found\nand more")

    monkeypatch.setattr("fastgen.engine.Engine.warm_up", broken)
    finding = diagnosis.check_compile(CPU)
    assert finding.status == FAIL
    assert finding.text == "two layers do not compile: no header found"


@pytest.mark.long
def test_two_layers_compile_here() -> None:
    assert diagnosis.check_compile(CPU).status == OK


def test_usage_errors_end_with_2_and_no_traceback() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "fastgen.doctor", "--modle", "x"], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "did you mean --model?" in ran.stderr and ran.stderr.count("\n") == 1
