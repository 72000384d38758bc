"""What `pip wheel .` packs: every module of ours, and the embedded pair."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_a_wheel_holds_every_module_and_the_embedded_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By setuptools' own step that gathers a wheel's files, without the isolated environment that pip makes."""
    pytest.importorskip("setuptools")
    from setuptools.dist import Distribution

    monkeypatch.chdir(ROOT)
    distribution = Distribution({"script_name": "pyproject.toml"})
    distribution.parse_config_files([str(ROOT / "pyproject.toml")])
    command = distribution.get_command_obj("build_py")
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    command.run()
    packed = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*") if path.is_file()}
    wanted = [path for package in ("fastgen", "quantize", "tp") for path in (ROOT / package).rglob("*.py")]
    wanted += [path for path in (ROOT / "fastgen" / "assets").rglob("*") if path.is_file()]
    assert {path.name for path in wanted} >= {"cli.py", "model.safetensors", "tokenizer.json", "config.json"}
    for path in wanted:
        found = packed.get(path.relative_to(ROOT).as_posix())
        assert found and found.read_bytes() == path.read_bytes(), f"{path} is not in the wheel as it stands"
