"""`fastgen.generate` one of whose ranks ends or stops of itself: python -m tests.disturbed_rank PLAN FLAGS.

PLAN is a JSON object: `seconds` after `rank` has first come to `phase`, it writes the file `marker` and sends itself
the signal of that `number` (0: none, and whoever waits for the file does something).
"""

import json
import os
import sys
import threading
from pathlib import Path

from fastgen import cli, generate
from tp.watch import process_watch


def disturb(*, phase: str, seconds: float, number: int, marker: str) -> None:
    """Have this process disturbed, as the plan says."""
    watch = process_watch()
    report = watch.at

    def act() -> None:
        Path(marker).touch()
        os.kill(os.getpid(), number)

    timer = threading.Timer(seconds, act)
    timer.daemon = True

    def at(name: str) -> None:
        report(name)
        if name == phase and timer.ident is None:
            timer.start()

    watch.at = at  # type: ignore[method-assign]


if __name__ == "__main__":
    plan = json.loads(sys.argv.pop(1))
    if os.environ["RANK"] == str(plan.pop("rank")):
        disturb(**plan)
    cli.run(generate.main, prog=generate.PROG)
