"""What a machine has, checked against what the commands need: each finding with its fix.

Nothing here changes anything but caches (the compile test fills them, as any compiled run does).
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from fastgen.completion import GenerationOptions
from fastgen.config import ModelConfig
from fastgen.device import choose_placement, describe
from fastgen.engine import Engine
from fastgen.load import random_model

OK, WARN, FAIL = "OK", "WARN", "FAIL"

PYTHONS = ((3, 11), (3, 13))
PAIRINGS = {(2, 11): "3.6", (2, 12): "3.7.0", (2, 13): "3.7.1", (2, 14): "3.8", (2, 15): "3.9"}
"""The Triton that each PyTorch requires (the metadata of its CUDA wheels on PyPI)."""

EXTRAS = {
    "gguf": "GGUF files, the built-in smollm2 among them",
    "tiktoken": "Meta's own Llama 3 tokenizer file",
}
"""Optional packages and what they read."""

LOW_MEMORY, LOW_DISK = 2 << 30, 4 << 30
SMOKE_MODEL = ModelConfig(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=128, vocab_size=258, max_seq_len=64
)
SMOKE_TOKENS = 8


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis; `fix` says what to do unless the status is OK."""

    status: str
    name: str
    text: str
    fix: str = ""


def examine() -> Iterator[Finding]:
    """Yield what can be found out at once: everything but the bandwidth and `check_compile`."""
    yield check_python()
    yield check_torch()
    yield check_triton(has_gpu=torch.cuda.is_available())
    yield check_compiler()
    yield from check_gpus()
    yield check_cpu()
    yield check_memory()
    yield from check_caches()
    yield from check_extras()


def check_python() -> Finding:
    """Python is a version that the project is tested with."""
    lowest, highest = (".".join(map(str, one)) for one in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        return Finding(OK, "python", platform.python_version())
    return Finding(WARN, "python", f"{platform.python_version()}, untested", f"use Python {lowest} to {highest}")


def check_torch() -> Finding:
    """PyTorch is a version that the project is tested with, and sees the GPU that the machine has."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    text = f"{torch.__version__} ({build})"
    release = _release(torch.__version__)
    lowest, highest = min(PAIRINGS), max(PAIRINGS)
    if release < lowest:
        return Finding(FAIL, "torch", f"{text} is too old", f"pip install 'torch>={lowest[0]}.{lowest[1]}'")
    if release > highest:
        return Finding(WARN, "torch", f"{text}, untested", f"up to {highest[0]}.{highest[1]} is tested")
    return Finding(OK, "torch", text)


def check_triton(*, has_gpu: bool) -> Finding:
    """Triton is the one that belongs to this PyTorch; only GPUs need it."""
    expected = PAIRINGS.get(_release(torch.__version__))
    found = _installed("triton")
    trouble = FAIL if has_gpu else WARN
    if found is None:
        if not has_gpu:
            return Finding(OK, "triton", "not installed; only GPUs need it")
        return Finding(FAIL, "triton", "not installed", f"pip install 'triton=={expected or '*'}'")
    if expected is None:
        return Finding(WARN, "triton", f"{found}; its torch is not known", "keep the one that pip chose with torch")
    if found != expected and not found.startswith(f"{expected}."):
        fix = f"pip install 'triton=={expected}{'' if expected.count('.') == 2 else '.*'}'"
        return Finding(trouble, "triton", f"{found}, but torch {torch.__version__} pairs with {expected}", fix)
    return Finding(OK, "triton", f"{found}, which pairs with this torch")


def check_compiler() -> Finding:
    """There is the C++ compiler that Inductor calls (CXX, else g++)."""
    try:
        compiler = get_cpp_compiler()
    except InvalidCxxCompiler:
        wanted = os.environ.get("CXX", "g++")
        return Finding(
            FAIL, "compiler", f"{wanted} does not run; --compile needs a C++ compiler", "apt install g++, or set CXX"
        )
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return Finding(OK, "compiler", said.stdout.partition("\n")[0] or compiler)


def check_gpus() -> list[Finding]:
    """Every GPU, with its memory and what its generation lacks."""
    driver = _driver()
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding(OK, "gpu", "none; everything runs on the CPU")]
        fix = "update the driver" if torch.version.cuda else "install PyTorch's CUDA build (pytorch.org, Get started)"
        return [Finding(WARN, "gpu", f"NVIDIA driver {driver}, but torch cannot use a GPU", fix)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = (
            f"{properties.name}, sm_{properties.major}{properties.minor}, {free / 1e9:.1f} of {total / 1e9:.1f} GB "
            f"free, driver {driver or 'unknown'}"
        )
        name = f"gpu {index}"
        if properties.major < 8:
            findings.append(
                Finding(WARN, name, f"{text}; it has no bf16", "fp16 is used; --dtype fp32 if it overflows")
            )
        elif free < total // 2:
            findings.append(Finding(WARN, name, text, "other processes hold its memory: nvidia-smi lists them"))
        else:
            findings.append(Finding(OK, name, text))
    return findings


def check_cpu() -> Finding:
    """The CPU, and which precision it gives."""
    placement = choose_placement("cpu")
    dtype = str(placement.dtype).removeprefix("torch.")
    cores = psutil.cpu_count(logical=False) or os.cpu_count()
    return Finding(
        OK, "cpu", f"{_cpu_name()}, {cores} cores, {describe(placement.device)}: {dtype} ({placement.reason})"
    )


def check_memory() -> Finding:
    """There is main memory to load a model into."""
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available < LOW_MEMORY:
        return Finding(WARN, "memory", text, "end other programs, or use small models")
    return Finding(OK, "memory", text)


def available_bytes(device: torch.device) -> int:
    """Return how much of the device's memory, or of the machine's for a CPU, is there to take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_caches() -> list[Finding]:
    """The folders that compiled kernels and downloaded models are kept in, with their sizes and the space there."""
    folders: dict[str, str | Path] = {
        "TORCHINDUCTOR_CACHE_DIR": default_cache_dir(),
        "TRITON_CACHE_DIR": Path.home() / ".triton" / "cache",
        "HF_HUB_CACHE": HF_HUB_CACHE,
    }
    return [_check_cache(name, Path(os.environ.get(name) or default)) for name, default in folders.items()]


def check_extras() -> list[Finding]:
    """The optional packages."""
    findings = []
    for name, use in EXTRAS.items():
        found = _installed(name)
        if found is None:
            findings.append(Finding(WARN, name, f"not installed; it reads {use}", f"pip install 'fastgen[{name}]'"))
        else:
            findings.append(Finding(OK, name, f"{found}, reads {use}"))
    return findings


def check_compile(device: torch.device) -> Finding:
    """A model of two layers compiles, and gives the tokens that it gives uncompiled."""
    options = GenerationOptions(max_new_tokens=SMOKE_TOKENS, ignore_eos=True)
    prompt = [[1, 2, 3]]
    model = random_model(SMOKE_MODEL, choose_placement(str(device), "fp32"))
    expected = Engine(model).generate(prompt, options)[0].tokens
    start = time.perf_counter()
    try:
        engine = Engine(model, compile=True)
        engine.warm_up(options)
        tokens = engine.generate(prompt, options)[0].tokens
    except (RuntimeError, OSError) as error:  # all that the compiler raises is a RuntimeError
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Finding(
            FAIL, "compile", f"two layers do not compile: {reason}", "see the lines above; run without --compile"
        )
    seconds = time.perf_counter() - start
    if tokens != expected:
        fix = "run without --compile, and report this with the versions above"
        return Finding(FAIL, "compile", f"compiled tokens {tokens} differ from eager ones {expected}", fix)
    return Finding(OK, "compile", f"two layers in {seconds:.1f} s, tokens as uncompiled")


def _release(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Return the version of the NVIDIA driver, if there is one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.partition("\n")[0].strip() or None if said.returncode == 0 else None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _check_cache(variable: str, folder: Path) -> Finding:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{folder}: {_folder_bytes(folder) / 1e9:.2f} GB, {free / 1e9:.1f} GB free"
    if not os.access(existing, os.W_OK):
        return Finding(WARN, "cache", f"{text}; cannot be written", f"set {variable} to a folder of yours")
    if free < LOW_DISK:
        return Finding(WARN, "cache", text, f"free some space, or set {variable} to another disk")
    return Finding(OK, "cache", text)


def _folder_bytes(folder: Path) -> int:
    """Return the bytes of all files below, links not followed; those that vanish meanwhile count nothing."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size
            except FileNotFoundError:
                continue
    return total
