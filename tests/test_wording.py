"""Numbers are written as a person says them."""

import pytest

from tetdist.errors import UserError, sentence
from tetdist.tables import aligned
from tetdist.wording import are, counted, duration, meant


@pytest.mark.parametrize(
    ("number", "thing", "expected"),
    [
        (0, "problem", "0 problems"),
        (1, "problem", "1 problem"),
        (2, "class", "2 classes"),
        (2, "epoch", "2 epochs"),
        (1, "class", "1 class"),
        (1234567, "image", "1,234,567 images"),
    ],
)
def test_one_is_singular(number, thing, expected):
    assert counted(number, thing) == expected


def test_control_characters_of_names_are_escaped():
    name = "a\x1b[2J\tb\u202ec\udce9ü \n"
    assert sentence(UserError(name)) == r"a\x1b[2J\tb\u202ec\udce9ü \n"
    assert aligned([["\x1b", "x"], ["run", "y"]]) == "  \\x1b  x\n  run   y"


def test_capitals_do_not_matter_to_what_is_meant():
    assert meant("PLIF", ["lif", "plif"]) == meant("plf", ["plif"]) == "did you mean plif?"
    assert meant("myrun", ["MyRun"]) == "did you mean MyRun?"


def test_one_thing_is_and_others_are():
    assert [are(0), are(1), are(2)] == ["are", "is", "are"]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.3, "0 s"),
        (45, "45 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (3600, "1 h"),
        (9823, "2 h 43 min"),
        (3605, "1 h"),
        (7 * 86_400 + 7200, "7 d 2 h"),
        (86_400 + 59, "1 d"),
    ],
)
def test_a_time_has_its_two_largest_units(seconds, expected):
    assert duration(seconds) == expected
