"""One of several processes that watch each other: python -m tests.watch_worker FOLDER TIMEOUT CODE; RANK and WORLD_SIZE
in the environment.

They find each other through files in FOLDER, which takes no torch. CODE runs with `watch`, `sleep` and `rank`.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tp.watch import Watch


def main(folder: Path, timeout: float, code: str) -> None:
    """Join the others and do what was said."""
    watch = Watch()
    watch.begin(silence=False)

    def exchange(text: str) -> Sequence[str]:
        staging = folder / f"staging{watch.place.rank}"
        staging.write_text(text)
        staging.rename(folder / f"rank{watch.place.rank}")
        files = [folder / f"rank{rank}" for rank in range(watch.place.world)]
        while not all(file.exists() for file in files):
            time.sleep(0.01)
        return [file.read_text() for file in files]

    with watch:
        watch.connect(exchange, "127.0.0.1", timeout)
        exec(code, {"watch": watch, "sleep": time.sleep, "rank": watch.place.rank, "folder": folder})  # noqa: S102
        watch.leave(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3])
