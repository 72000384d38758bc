"""Fixtures that many test files share."""

import os
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models, tokenizers and texts beside the checkout; the test is skipped without it."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data")
    return DATA


@pytest.fixture
def quick_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures and a measurement of the arithmetic rate, which take most of the time of a small run."""
    monkeypatch.setattr("fastgen.training.run_folder.can_draw", lambda: False)
    monkeypatch.setattr("fastgen.training.run.measure_flop_rate", lambda device, dtype: 1e12)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are collected everywhere and run where there is one."""
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_configure() -> None:
    """Two workers on two cores: one thread each, and no tokenizer threads behind a fork."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    torch.set_num_threads(1)
