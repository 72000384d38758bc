"""Ctrl-C and closed pipes, on a real process."""

import array
import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO

import pytest

from tests.checkpoint_writers import LLAMA, make_model, write_hf
from tests.vocabularies import small_sentencepiece

CONFIG = LLAMA | {"vocab_size": 512, "max_position_embeddings": 8192}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A generation that would take minutes."""
    folder: Path = write_hf(tmp_path_factory.mktemp("hf") / "model", CONFIG, make_model(CONFIG))
    (folder / "tokenizer.model").write_bytes(small_sentencepiece())
    flags = ["--model", str(folder), "--device", "cpu", "--max-new-tokens", "8000", "--ignore-eos"]
    return [sys.executable, "-m", "fastgen.generate", *flags]


def start(command: list[str], stdin: int | None = None) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


def wait_until_read(pipe: IO[bytes]) -> None:
    """Return when the process at the other end has taken all that was written."""
    waiting = array.array("i", [1])
    while waiting[0]:
        time.sleep(0.01)
        fcntl.ioctl(pipe.fileno(), termios.FIONREAD, waiting)


def test_ctrl_c_while_the_text_streams_keeps_it_and_says_what_was_measured(command: list[str]) -> None:
    with start(command) as process:
        assert process.stdout and process.stderr
        shown = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(shown + rest) > 20
    assert b"tok/s" in err and b"Traceback" not in err


def test_ctrl_c_before_the_text_ends_at_once(command: list[str]) -> None:
    with start([*command, "--prompt", "-"], stdin=subprocess.PIPE) as process:
        assert process.stdin
        process.stdin.write(b"Once")
        process.stdin.flush()
        wait_until_read(process.stdin)  # flags are parsed; importing and loading are all still to come
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT), "a shell sees 130 in both"
    assert not out


def test_a_reader_that_has_seen_enough_ends_the_command_silently(command: list[str]) -> None:
    with start(command) as process:
        assert process.stdout and process.stderr
        process.stdout.read(20)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=60)
    assert process.returncode == 0
    assert b"Traceback" not in err and b"BrokenPipe" not in err


BAR = """
import time
from fastgen import cli
def command():
    with cli.Phases().phase("load") as advance:
        advance(1, 2)
        time.sleep(60)
cli.run(command, prog="test")
"""


def test_ctrl_c_behind_a_progress_bar_leaves_the_terminal_with_a_cursor() -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", BAR], stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while b"\x1b[?25l" not in shown:
            shown += os.read(ours, 1000)
        process.send_signal(signal.SIGINT)
        while b"\x1b[?25h" not in shown:
            shown += os.read(ours, 1000)  # fails once all has been read
        assert process.wait(timeout=60) == 130
    os.close(ours)
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")
    assert b"Traceback" not in shown
