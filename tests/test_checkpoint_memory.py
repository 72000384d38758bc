"""Host memory while a checkpoint is read: one tensor at a time, whatever the size of the model."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoint_writers import LLAMA

CONFIG = LLAMA | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 32000,
}

# Measured from after the imports, which peak higher than some checkpoints; "5" resets the peak (proc(5)).
CHILD = """
import sys
from pathlib import Path
import torch
from fastgen.checkpoint.detect import open_checkpoint

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
tensors = open_checkpoint(Path(sys.argv[1])).tensors
total = 0
for tensor in tensors.values():
    total += tensor[:].nbytes
print(total, max(tensor.nbytes for tensor in tensors.values()), memory("VmHWM") - before)
"""


def write_sparse(folder: Path) -> None:
    """Write an fp16 model of 1 GB, all zeros, of which the disk holds only the header."""
    dim, hidden, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens": (vocab, dim), "model.norm": (dim,), "lm_head": (vocab, dim)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{part}_proj": (dim, dim) for part in "qkvo"}
        shapes |= {f"{prefix}mlp.{part}_proj": (hidden, dim) for part in ("gate", "up")}
        shapes[f"{prefix}mlp.down_proj"] = (dim, hidden)
        shapes[f"{prefix}input_layernorm"] = shapes[f"{prefix}post_attention_layernorm"] = (dim,)
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[f"{name}.weight"] = {"dtype": "F16", "shape": shape, "data_offsets": (position, end)}
        position = end
    raw = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + position)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_checkpoint_of_a_gigabyte_takes_the_memory_of_one_tensor(tmp_path: Path) -> None:
    write_sparse(tmp_path)
    child = subprocess.run([sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True)
    total, largest, peak = map(int, child.stdout.split())
    assert total > 1_000_000_000
    # glibc keeps up to 64 MB of what was freed, and composing wqkv or w_gate_up takes their parts once more.
    assert peak < largest + 128 * 2**20, f"peak of {peak} bytes, where the largest tensor has {largest}"
