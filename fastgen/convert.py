"""Checks a folder that was written here: `python -m fastgen.convert --verify DIR`.

Every file is compared with the manifest of hashes that lies among them. Exit status 3 says that something differs.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastgen import cli
from fastgen.errors import ModelFileError, UsageError

PROG = "fastgen.convert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig(cli.OutputFlags):
    """The flags of `fastgen.convert`."""

    verify: str | None = cli.flag(None, "compare this folder with its manifest", metavar="DIR")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    config = cli.parse(ConvertConfig, argv, prog=PROG, description="Check a folder that was written here.")
    if config.verify is None:
        raise UsageError("--verify DIR is missing; conversion is not built yet")
    from fastgen.manifest import verify_manifest

    problems = verify_manifest(Path(config.verify))
    if config.json:
        sys.stdout.write(
            json.dumps({"schema_version": 1, "command": PROG, "folder": config.verify, "problems": problems}) + "\n"
        )
    if problems:
        raise ModelFileError(
            f"{config.verify}: {len(problems)} file(s) differ from the manifest\n" + "\n".join(problems)
        )
    sys.stderr.write(f"{config.verify}: every file is what was written\n")
    return 0


if __name__ == "__main__":
    cli.run(main, prog=PROG)
