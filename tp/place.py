"""Where this process stands among those that torchrun started, by its environment."""

import os
from dataclasses import dataclass

from fastgen.errors import UsageError


@dataclass(frozen=True)
class Place:
    """Process `rank` of `world`, number `local` on its machine; a single process by default."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes files."""
        return self.rank == 0


def place_from_environment() -> Place:
    """Return this process's place; raises `UsageError` for an environment that makes no sense."""
    names = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
    values = [os.environ.get(name, default) for name, default in names]
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        found = ", ".join(f"{name}={value}" for (name, _), value in zip(names, values, strict=True))
        raise UsageError(f"the environment has {found}: expected what torchrun sets, numbers with RANK < WORLD_SIZE")
    return Place(*map(int, values))


def check_meeting_place() -> None:
    """Raise `UsageError` unless the environment says where several processes meet, as torchrun's does."""
    world, port = os.environ.get("WORLD_SIZE"), os.environ.get("MASTER_PORT", "")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UsageError(
            f"the environment has WORLD_SIZE={world}, but no {' and no '.join(missing)}\n"
            "Start with torchrun, or unset WORLD_SIZE for one process"
        )
    if not port.isdecimal() or not 1 <= int(port) < 1 << 16:
        raise UsageError(f"the environment has MASTER_PORT={port}: expected what torchrun sets, a port from 1 to 65535")
