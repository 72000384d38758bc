"""A command one of whose ranks ends, stops or fails of itself: python -m tests.disturbed_rank PLAN FLAGS.

PLAN is a JSON object: `seconds` after `rank` of the `command`, generate or bench, has first come to `phase`, it writes
the file `marker` and sends itself the signal of that `number` (0: none, and whoever waits for the file does something;
null: none, and the rank raises an error where it next comes on).
"""

import json
import os
import sys
import threading
from pathlib import Path

from fastgen import bench, cli, generate
from tp.watch import process_watch

COMMANDS = {"generate": generate, "bench": bench}


def disturb(*, phase: str, seconds: float, number: int | None, marker: str) -> None:
    """Have this process disturbed, as the plan says."""
    watch = process_watch()
    report, due = watch.at, threading.Event()

    def act() -> None:
        if number is None:
            due.set()
        else:
            Path(marker).touch()
            os.kill(os.getpid(), number)

    timer = threading.Timer(seconds, act)
    timer.daemon = True

    def at(name: str) -> None:
        report(name)
        if name == phase and timer.ident is None:
            timer.start()
        if due.is_set():
            Path(marker).touch()
            raise RuntimeError("disturbed")

    watch.at = at  # type: ignore[method-assign]


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    command = COMMANDS[plan.pop("command")]
    if os.environ["RANK"] == str(plan.pop("rank")):
        disturb(**plan)
    cli.run(command.main, prog=command.PROG)
