"""A rank reads its share of a file, whatever the format, and holds no more than that in memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from fastgen.checkpoint.detect import open_checkpoint
from fastgen.device import choose_placement
from fastgen.files import RandomAccessFile
from fastgen.load import build
from quantize.run import main
from tests.checkpoint_writers import LLAMA, make_model, write_gguf, write_hf, write_llama2c, write_torch
from tests.test_checkpoint_memory import write_sparse
from tests.vocabularies import small_sentencepiece
from tp.plan import make_plan

CONFIG = LLAMA | {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 512,
}


def gguf_of(kind: gguf.GGMLQuantizationType) -> Callable[[Path], Path]:
    return lambda folder: write_gguf(folder / "m.gguf", CONFIG, make_model(CONFIG), kind=kind)


def quantized(*flags: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        source = write_hf(folder / "plain", CONFIG, make_model(CONFIG))
        (source / "tokenizer.model").write_bytes(small_sentencepiece())
        assert main(["--model", str(source), "--out", str(folder / "q"), "--device", "cpu", *flags]) == 0
        return folder / "q"

    return write


FORMATS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda folder: write_hf(folder / "m", CONFIG, make_model(CONFIG)),
    "bin": lambda folder: write_torch(folder / "m", CONFIG, make_model(CONFIG)),
    "llama2.c": lambda folder: write_llama2c(folder / "m.bin", CONFIG, make_model(CONFIG)),
    "gguf F32": gguf_of(gguf.GGMLQuantizationType.F32),
    "gguf Q8_0": gguf_of(gguf.GGMLQuantizationType.Q8_0),
    "int8": quantized("--quant", "int8"),
    "int4": quantized("--quant", "int4", "--group-size", "32"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_rank_reads_its_share_of_the_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(FORMATS[name](tmp_path))
    sizes: list[int] = []
    read = RandomAccessFile.read_tensor

    def counted(self: RandomAccessFile, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        tensor = read(self, offset, shape, dtype)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(RandomAccessFile, "read_tensor", counted)
    placement = choose_placement("cpu", "fp32")

    def bytes_read(world: int, rank: int) -> int:
        sizes.clear()
        plan = make_plan(checkpoint.config, checkpoint.formats, world, rank) if world > 1 else None
        build(checkpoint.config, checkpoint.tensors, placement, formats=checkpoint.formats, plan=plan)
        return sum(sizes)

    everything = bytes_read(1, 0)
    for world in (2, 4):
        shares = [bytes_read(world, rank) / everything for rank in range(world)]
        assert max(shares) < 1.05 / world, f"{world} ranks read {shares}"


CHILD = """
import sys
from pathlib import Path
import torch
from fastgen.checkpoint.detect import open_checkpoint
from fastgen.device import choose_placement
from fastgen.load import build
from fastgen.model import Transformer
from tp.plan import make_plan

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

checkpoint = open_checkpoint(Path(sys.argv[1]))
plan = make_plan(checkpoint.config, {}, 4, 1)
with torch.device("meta"):
    Transformer(plan.local())  # imports what this takes
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
model = build(checkpoint.config, checkpoint.tensors, choose_placement("cpu", "fp16"), plan=plan)
sizes = [tensor.nbytes for tensor in checkpoint.tensors.values()]
print(sum(sizes), max(sizes), memory("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_of_four_ranks_takes_a_quarter_of_the_memory(tmp_path: Path) -> None:
    write_sparse(tmp_path)
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True)
    total, largest, peak = map(int, child.stdout.split())
    assert total > 1_000_000_000
    # Beside the share itself: a tensor's parts while they are composed, and the 64 MB that glibc may keep when freed.
    assert peak < total / 4 + 2 * largest / 4 + 64 * 2**20, f"peak of {peak} bytes for a quarter of {total}"
