"""What refusing a bad checkpoint takes: every named one of every form, under a second and under 64 MiB."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_files import FILE_CASES
from tests.bad_hf_folders import HF_CASES
from tests.large_files import LARGE_CASES
from tests.test_foreign_quantized import BAD_QUANTIZED
from tests.test_meta import META_CASES

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MEMORY = 1.0, 64 << 20

CHILD = """
import sys, time, tempfile
from pathlib import Path
from fastgen.checkpoint.detect import open_checkpoint
from fastgen.errors import ModelFileError
from tests.test_bad_checkpoint_costs import builders

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))

for name, build in builders().items():
    path = build(Path(sys.argv[1]) / str(abs(hash(name))))
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.process_time()
    try:
        open_checkpoint(path)
        outcome = "loaded"
    except ModelFileError:
        outcome = "refused"
    print(name, outcome, time.process_time() - start, memory("VmHWM") - before, sep="\\t")
"""


def builders() -> dict[str, object]:
    """Return what builds each bad checkpoint in an empty folder."""
    from tests.quantized_writers import quantized_model

    def in_folder(build: object) -> object:
        def made(root: Path) -> Path:
            root.mkdir()
            return build(root)

        return made

    sound = quantized_model()

    def quantized(write: object) -> object:
        return lambda root: write(root / "model", *sound)

    tables = {name: in_folder(build) for name, (build, _) in (HF_CASES | FILE_CASES | LARGE_CASES).items()}
    tables |= {f"meta: {name}": (lambda root, build=build: build(root)) for name, (build, _) in META_CASES.items()}
    return tables | {name: in_folder(quantized(write)) for name, (write, _) in BAD_QUANTIZED.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_bad_checkpoint_of_any_form_is_refused_in_little_time_and_memory(tmp_path: Path) -> None:
    """CPU time, so that a busy machine does not count; most take a few milliseconds."""
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path], capture_output=True, text=True, check=True, cwd=ROOT
    )
    rows = [line.split("\t") for line in child.stdout.splitlines()]
    assert len(rows) == len(builders()) >= 60
    assert not [name for name, outcome, *_ in rows if outcome != "refused"]
    assert not [(name, seconds) for name, _, seconds, _ in rows if float(seconds) > SECONDS]
    assert not [(name, peak) for name, _, _, peak in rows if int(peak) > MEMORY]
