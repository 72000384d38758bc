"""The kernels in Triton's interpreter, which must be chosen before Triton is imported: a process of its own."""

import os
import subprocess
import sys
from pathlib import Path


def test_kernels_agree_with_the_reference_in_the_interpreter() -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-k",
        "in_the_interpreter and not kernels_agree",
    ]
    done = subprocess.run(
        [*command, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "skipped" not in done.stdout.splitlines()[-1], done.stdout[-300:]
