"""The README's Python runs as it stands, its commands and flags exist, and its figures are the results'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_its_python_example_runs(capsys: pytest.CaptureFixture) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    namespace: dict = {}
    exec(compile(example, "README.md", "exec"), namespace)  # noqa: S102
    assert namespace["answer"].text.startswith(", there was a little")
    assert len(capsys.readouterr().out.split()) > 20


def test_its_commands_and_flags_exist(capsys: pytest.CaptureFixture) -> None:
    commands = set(re.findall(r"-m fastgen\.(\w+)", README))
    assert {"generate", "bench"} <= commands
    for command in commands:
        module = __import__(f"fastgen.{command}", fromlist=["main"])
        with pytest.raises(SystemExit):
            module.main(["--help"])
        help_text = capsys.readouterr().out
        for line in re.findall(rf"-m fastgen\.{command}\b(.*)", README):
            for flag in re.findall(r"(--[a-z-]+)", line.split("#")[0].split("|")[0]):
                assert flag in help_text, f"fastgen.{command} has no {flag}"


def test_its_tables_are_made_from_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/make_tables", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
