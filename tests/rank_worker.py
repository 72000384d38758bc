"""One of the processes that run the cases of `tests.sharded` over gloo: python -m tests.rank_worker RANK JOBS FOLDER.

Processes are dear to start, so the same ones form groups of several sizes, one after the other. JOBS is a JSON object
of group sizes and the names of the cases that run on so many; every rank writes what it computed to FOLDER.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from tests.sharded import CASES, drafting, logits, part, texts, whole
from tp.dist import Ranks
from tp.place import Place


def main(rank: int, jobs: dict[str, list[str]], folder: Path) -> None:
    """Run this rank's part of all cases."""
    torch.set_num_threads(1)
    found = {}
    for size, names in ((int(key), names) for key, names in jobs.items() if rank < int(key)):
        dist.init_process_group("gloo", init_method=f"file://{folder}/group{size}", rank=rank, world_size=size)
        for name in names:
            ranks = Ranks(Place(rank, size, rank))
            mine = part(whole(CASES[name]), ranks)
            speculated = texts(mine, part(drafting(CASES[name]), ranks))
            found[name, size] = (logits(mine), texts(mine), speculated)
        dist.destroy_process_group()
    torch.save(found, folder / f"found{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))
