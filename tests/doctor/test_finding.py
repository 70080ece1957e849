import math

import pytest

from detdistill.doctor.finding import (
    Finding,
    Section,
    counted,
    few,
    finite,
    from_error,
    worst,
)
from detdistill.errors import UserError


@pytest.mark.parametrize("level", ["warning", "problem"])
def test_what_is_wrong_says_what_to_do(level):
    with pytest.raises(ValueError, match="says what to do"):
        Finding(level, "something")
    assert Finding(level, "something", "do this").advice == "do this"


def test_the_gravest_level_counts():
    ok, note = Finding("ok", "a"), Finding("note", "b")
    warning, problem = Finding("warning", "c", "do"), Finding("problem", "d", "do")
    assert worst([]) == "ok"
    assert worst([Section("a", "A", [note, ok])]) == "note"
    assert worst([Section("a", "A", [problem]), Section("b", "B", [warning])]) == "problem"


def test_a_refusal_ends_with_what_to_do():
    found = from_error("problem", UserError("a.json: broken; twice; copy it again"))
    assert (found.text, found.advice) == ("a.json: broken; twice", "copy it again")
    whole = from_error("problem", UserError("a.json has no list 'images'"))
    assert whole.text == "a.json has no list 'images'" and whole.advice


def test_words():
    assert few(["a", "b", "c"]) == "a, b, c"
    assert few(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert [counted(n, "box") for n in (0, 1, 2)] == ["0 boxes", "1 box", "2 boxes"]
    assert counted(2, "class") == "2 classes" and counted(2, "image") == "2 images"
    assert finite(0.5) == 0.5 and finite(math.nan) is None and finite(math.inf) is None
