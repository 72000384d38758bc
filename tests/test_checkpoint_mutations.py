"""20,000 damaged checkpoints: refused by name, or loaded soundly. A million: `scripts/fuzz_checkpoints`."""

from pathlib import Path

import pytest

from tests.mutations import SHARES, Base, examine, make_bases, mutate

TOTAL = 20_000


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    return make_bases()


def test_every_form_has_its_share_of_the_twenty_thousand(bases: dict[str, Base]) -> None:
    assert SHARES.keys() == bases.keys()
    assert sum(SHARES.values()) == TOTAL


@pytest.mark.parametrize("form", SHARES)
def test_damage_is_refused_by_name_or_loads_what_is_there(bases: dict[str, Base], tmp_path: Path, form: str) -> None:
    base, outcomes = bases[form], {"refused": 0, "loaded": 0}
    base.write(tmp_path)
    assert examine(base, tmp_path) == "loaded", "undamaged"
    for seed in range(SHARES[form]):
        changes = mutate(base, seed)
        base.write(tmp_path, changes)
        try:
            outcomes[examine(base, tmp_path)] += 1
        except Exception as error:
            raise AssertionError(f"{form}, case {seed}, {sorted(changes)}: {type(error).__name__}") from error
        base.write(tmp_path, {name: base.files[name] for name in changes})
    assert min(outcomes.values()) > SHARES[form] / 50, outcomes


POINTS = 256


@pytest.mark.parametrize("form", SHARES)
def test_a_file_cut_at_any_of_256_points_is_refused_or_sound(bases: dict[str, Base], tmp_path: Path, form: str) -> None:
    """Files of weights are refused wherever they are cut, but for a GGUF's padding, and zip's behind its last field."""
    base = bases[form]
    base.write(tmp_path)
    for name, whole in base.files.items():
        near = [*range(48), *range(len(whole) - 48, len(whole))]
        points = {*near, *(len(whole) * part // POINTS for part in range(POINTS))}
        loaded = []
        for length in sorted(point for point in points if 0 <= point < len(whole)):
            base.write(tmp_path, {name: whole[:length]})
            if examine(base, tmp_path) == "loaded":
                loaded.append(length)
        base.write(tmp_path, {name: whole})
        slack = 32 if name.endswith(".gguf") else 0
        assert all(length >= len(whole) - slack for length in loaded), (name, loaded)
