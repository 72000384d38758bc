"""Several torchrun agents, as on several machines: on loopback, and each in a network namespace of its own."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastgen.engine import Engine
from fastgen.load import load_model
from fastgen.options import GenerationOptions
from tests.torchrun import Run, torchrun

FLAGS = ("--device", "cpu", "--dtype", "fp32", "--max-new-tokens", "12", "--check-ranks")


def check(run: Run) -> None:
    """The run ends well, and has told what one process tells, once."""
    for agent in run.agents:
        assert agent.wait(timeout=200) == 0, run.message()
    (answer,) = Engine(load_model("stories", device="cpu", dtype="fp32"), max_seq_len=64).generate(
        ["Once upon a time"], GenerationOptions(max_new_tokens=12)
    )
    assert run.message().count(answer.text) == 1, run.message()


def test_two_agents_on_loopback_give_the_text_of_one_process(tmp_path: Path) -> None:
    with torchrun(tmp_path, 1, *FLAGS, prefixes=((), ())) as run:
        check(run)


@contextlib.contextmanager
def two_networks() -> Iterator[list[tuple[str, ...]]]:
    """Two network namespaces, joined by a wire of 10.77.0.1 and 10.77.0.2; yields the prefixes of commands in each."""
    names = ["fastgen-test-a", "fastgen-test-b"]
    wire = ["link", "add", "wire-a", "netns", names[0], "type", "veth", "peer", "name", "wire-b", "netns", names[1]]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces here: {done.stderr.strip()}")

    try:
        for name in names:
            ip("netns", "add", name)
        ip(*wire)
        for number, (name, end) in enumerate(zip(names, ("wire-a", "wire-b"), strict=True), 1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [("ip", "netns", "exec", name) for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@pytest.mark.long
def test_two_network_namespaces_give_the_text_of_one_process(tmp_path: Path) -> None:
    with two_networks() as prefixes, torchrun(tmp_path, 2, *FLAGS, prefixes=prefixes, address="10.77.0.1") as run:
        check(run)
