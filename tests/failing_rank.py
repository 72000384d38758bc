"""`fastgen.generate` whose rank 1 is told of a model that is not there."""

import os
import sys

from fastgen import cli, generate

if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        sys.argv[sys.argv.index("--model") + 1] = "/not/there"
    cli.run(generate.main, prog=generate.PROG)
