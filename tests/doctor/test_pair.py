import pytest

from detdistill.doctor.pair import Fit, build_arm, check_fit, check_pair, describe_helpers
from tests.doctor.conftest import levels
from tests.helpers import narrow


def test_a_method_that_fits_says_what_it_adds():
    student, teacher = narrow(), narrow(seed=1, fpn_channels=32)
    fit = check_fit(student, teacher, "pkd", {"pkd": {}})
    assert fit.reason == ""
    assert fit.helpers == ("adds 1x1 convolution 16 to 32, for training alone (544 parameters)")
    assert check_fit(student, narrow(seed=1), "pkd", {"pkd": {}}).helpers == "adds nothing"


def test_assistants_are_counted():
    distiller = build_arm(narrow(), narrow("retinanet_r18", seed=1), {"head": {}})
    assert "assistants of" in describe_helpers(distiller.methods)


def test_other_layers_are_no_assistants():
    teacher = narrow("faster_rcnn_r18", seed=1)
    told = describe_helpers(build_arm(narrow(), teacher, {"g_detkd": {}}).methods)
    for part in ("1x1 convolution 16 to 16", "linear layer 16 to 32", "other layers of 1453 "):
        assert part in told
    assert "assistants" not in told


def test_a_method_that_does_not_fit_gives_its_reason():
    fit = check_fit(narrow(), narrow("fcos_r18"), "rm", {"rm": {}})
    assert "anchor" in fit.reason
    fit = check_fit(narrow(), None, "crosskd", {"crosskd": {}})
    assert "needs a teacher" in fit.reason and fit.lacks_teacher


def test_the_student_stays_as_it_is():
    """`transfer_head` copies the teacher's head into the student that it prepares for."""
    student, teacher = narrow(), narrow(seed=1)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    assert not check_fit(student, teacher, "a", {"feature": {"transfer_head": True}}).reason
    assert all(value.equal(before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize(("asked", "level"), [(False, "note"), (True, "problem")])
def test_classes_that_the_teacher_does_not_know_are_told_once(asked, level):
    student, teacher = narrow(num_classes=2), narrow(num_classes=2, seed=1)
    student.classes, teacher.classes = ["cat", "moo"], ["cat", "cow"]
    arms = [["crosskd"], ["ld"], ["pkd"], ["crosskd", "ld"], ["crosskd_roi"], ["mimic"]]
    fits = [check_fit(student, teacher, "+".join(m), {key: {} for key in m}) for m in arms]
    told, fitting, other = check_pair(fits, asked, "do")
    assert [f.level for f in (told, fitting, other)] == [level, "ok", level]
    beginning = "do not fit: crosskd, ld, mimic: the teacher gfl_r18 knows no class 'moo'"
    assert told.text.startswith(beginning)
    assert other.text.startswith("does not fit: crosskd_roi needs a student")
    [one, _] = check_pair(fits[1:3], asked, "do")
    assert one.text.startswith("does not fit: ld: the teacher gfl_r18 knows no class")


def test_levels():
    good, bad = Fit("pkd", helpers="adds nothing"), Fit("rm", reason="rm needs more")
    assert levels(check_pair([good, bad], False, "do")) == ["ok", "note"]
    assert levels(check_pair([good, bad], True, "do")) == ["ok", "problem"]
    waiting = [Fit(name, "needs a teacher", lacks_teacher=True) for name in ("rm", "pfi")]
    one, _ = check_pair([*waiting, good], False, "do")
    assert one.level == "note" and one.text.endswith("rm, pfi")
    assert levels(check_pair(waiting, False, "do")) == ["note"]
    assert levels(check_pair(waiting, True, "do")) == ["problem"] * 2
    *_, none = check_pair([bad, bad], False, "do")
    assert none.level == "problem" and none.advice == "do"
