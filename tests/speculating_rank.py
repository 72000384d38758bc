"""One of the processes of torchrun that speculate about the built-in model: its texts by drafter and number of drafts.

python -m tests.speculating_rank FOLDER writes them to FOLDER, a file a rank.
"""

import json
import sys
from pathlib import Path

from fastgen import cli
from fastgen.load import LoadedModel, load_model
from fastgen.options import GenerationOptions
from fastgen.speculation import AUTO, Speculation
from fastgen.speculative import SpeculativeEngine
from tp.dist import SINGLE, Ranks, join

PROMPT = "Once upon a time"
OPTIONS = GenerationOptions(max_new_tokens=12, ignore_eos=True)
DRAFTS = ("stories-draft", "stories", "self:3", "ngram")


def load(name: str, ranks: Ranks = SINGLE) -> LoadedModel:
    """This rank's part of a built-in model, or all of it."""
    return load_model(name, device="cpu", dtype="fp32", ranks=ranks, check_ranks=ranks.world > 1)


def main() -> int:
    """Generate by every drafter, 3 tokens a round and `auto`."""
    ranks, _ = join("cpu")
    target, found = load("stories", ranks), {}
    for name in DRAFTS:
        draft = load(name, ranks) if name.startswith("stories") else name
        for count in (3, AUTO):
            engine = SpeculativeEngine(target, Speculation(draft=draft, count=count), max_seq_len=64)
            (text,) = engine.generate([PROMPT], OPTIONS)
            found[f"{name} {count}"] = [list(text.tokens), engine.figures().arms]
    (Path(sys.argv[1]) / f"rank{ranks.rank}.json").write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    cli.run(main, prog="tests.speculating_rank")
