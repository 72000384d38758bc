"""N-grams continue the text as it went on when it last ended like this; rounds are as wide as they must be."""

import pytest
import torch

from fastgen.drafters import continue_text
from fastgen.pace import PLAIN, Arm
from fastgen.readback import Mark
from fastgen.rounds import width_of
from fastgen.tally import Launch, Tally

FOUND = {
    "the longest match, though another is later": ([5, 6, 7, 1, 9, 7, 2, 9, 5, 6, 7], [1, 9, 7]),
    "the latest of equally long ones": ([6, 7, 1, 9, 6, 7, 2, 8, 6, 7], [2, 8, 6]),
    "a match that goes on past the end repeats itself": ([1, 2, 3, 1, 2], [3, 1, 2, 3, 1]),
    "the last token, once, behind itself": ([4, 9, 9], [9, 9]),
    "without a match the last token again": ([1, 2, 3], [3, 3]),
    "what is before the beginning matches nothing": ([5, 8, 1, 0, 5, 9, 0, 0, 5], [9, 0]),
    "a text of one token": ([5], [5, 5]),
}


@pytest.mark.parametrize("case", FOUND)
def test_ngrams_continue_a_text(case: str) -> None:
    """What stands behind its end is of no account, though it looks like a match."""
    text, expected = FOUND[case]
    row = torch.tensor([*text, *text, 3, 3, 3])
    other = torch.arange(100, 100 + len(row))
    found = continue_text(torch.stack((row, other)), torch.tensor([len(text) - 1, len(text) - 1]), len(expected))
    assert found.tolist() == [expected, [100 + len(text) - 1] * len(expected)]


def test_a_round_is_the_narrowest_that_holds_the_drafts_and_one_token_more() -> None:
    assert [width_of(count) for count in (0, 1, 2, 3, 4, 7, 8, 15)] == [1, 2, 4, 4, 8, 8, 16, 16]


def test_a_tally_tells_drafting_from_showing_and_verifying() -> None:
    tally = Tally()
    times = [Mark(second, None) for second in (10.0, 11.0, 13.0, 17.0)]
    tally.record(Launch(Arm(0, 3), 4, (16,), *times), [4, 1])
    tally.record(Launch(PLAIN, 8, (), *times), [8, 8])
    assert (tally.draft_seconds, tally.verify_seconds) == ([2.0], [4.0])
    assert tally.arms == {Arm(0, 3): 1, PLAIN: 1}
    assert (tally.accepted, tally.tried, tally.kept) == ({3: 1, 0: 1}, {1: 2, 2: 1, 3: 1}, {1: 1, 2: 1, 3: 1})
    assert tally.rounds == 2 and tally.acceptance == 3 / 4
    figures = tally.figures(["model"])
    assert (figures.draft_ms, figures.verify_ms) == (2000.0, 4000.0)
