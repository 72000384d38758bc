"""Host memory of `quantize.run`: a layer at a time, whatever the size of the model."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgen.checkpoint.hf_save import hf_config, hf_tensors, write_json
from fastgen.config import ModelConfig
from fastgen.load import resolve
from fastgen.model import Transformer
from fastgen.shapes import shape

# Measured from after the imports; "5" resets the peak (proc(5)).
CHILD = """
import sys
from pathlib import Path
import torch
import fastgen.checkpoint.detect, fastgen.load, fastgen.session, quantize.folder
from quantize.run import main

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
main(["--model", sys.argv[1], "--out", sys.argv[2], "--device", "cpu", *sys.argv[3:]])
print(memory("VmHWM") - before)
"""


def write_random(folder: Path, config: ModelConfig) -> None:
    """Write a model of random bf16 weights, a file a tensor."""
    folder.mkdir()
    write_json(folder / "config.json", hf_config(config, torch.bfloat16))
    shutil.copy(resolve("stories") / "tokenizer.json", folder)
    with torch.device("meta"):
        model = Transformer(config)
    files: dict[str, str] = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        tensor = torch.randn(parameter.shape).mul_(0.02).bfloat16()
        parts = {part: piece.contiguous() for part, piece in hf_tensors(config, {name: tensor})}
        save_file(parts, folder / f"{number}.safetensors", metadata={"format": "pt"})
        files |= dict.fromkeys(parts, f"{number}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": files})


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_of_a_billion_weights_takes_less_than_two_layers_and_the_embedding(tmp_path: Path) -> None:
    config = shape("tinyllama-1.1b")
    write_random(tmp_path / "model", config)
    layer = sum((tmp_path / "model" / f"{number}.safetensors").stat().st_size for number in range(1, 7))
    embedding = 2 * config.vocab_size * config.dim
    for quant in ("int4", "int8"):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, tmp_path / "model", tmp_path / quant, "--quant", quant],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        peak = int(child.stdout.split()[-1])
        assert peak < 2 * layer + embedding, f"{quant}: a peak of {peak / 1e6:.0f} MB"
