"""Methods held against one another: pairs, the sentence about the best, the tables."""

import pytest

from detdistill.study.between import difference_rows, difference_values, differences, ranking
from detdistill.study.summary import Arm
from tests.study.fabricated_study import score


def study(**methods):
    """Control, methods and the control with the same time, by their APs."""
    aps = {"student": [30.0, 31.0, 32.0], **methods, "student_same_time": [33.0, 33.0, 33.0]}
    kinds = {"student": "control", "student_same_time": "same_time"}
    count = len(next(iter(methods.values())))
    return [
        Arm(name, kinds.get(name, "method"), tuple(score(k, ap) for k, ap in enumerate(of[:count])))
        for name, of in aps.items()
    ]


def test_each_pair_by_hand():
    # PKD over CrossKD: 1, 2, 3; mean 2, deviation 1, reach 4.30 / root of 3 = 2.48.
    arms = [Arm("teacher", "teacher", (score(0, 40.0),))]
    arms += study(crosskd=[33.0, 33.0, 35.0], pkd=[34.0, 35.0, 38.0])
    rows = differences(arms)
    header, crosskd, pkd = difference_rows(rows)
    assert header == ["over", "student", "CrossKD", "PKD", "student, same time"]
    assert pkd[:3] == ["PKD", "+4.7 (+1.8 to +7.5)", "+2.0 (-0.5 to +4.5)"]
    assert pkd[3] == "—" and crosskd[2:4] == ["—", "-2.0 (-4.5 to +0.5)"]
    values = {(entry["arm"], entry["over"]): entry["ap_gains"] for entry in difference_values(rows)}
    assert values["pkd", "crosskd"] == pytest.approx([0.01, 0.02, 0.03])
    assert len(values) == 6 and ("pkd", "pkd") not in values


def test_one_seed_has_no_interval_and_no_best():
    arms = study(crosskd=[33.0], pkd=[34.0])
    assert difference_rows(differences(arms))[2] == ["PKD", "+4.0", "+1.0", "—", "+1.0"]
    assert ranking(arms) == []


def test_one_method_is_held_against_no_other():
    arms = study(crosskd=[33.0, 33.0, 35.0])
    assert differences(arms) == [] and ranking(arms) == []


def test_the_best_for_certain():
    arms = study(rm=[30.0, 31.0, 32.1], crosskd=[33.0, 34.1, 35.0], pkd=[31.0, 32.0, 33.2])
    assert ranking(arms) == [
        "At equal steps CrossKD is the best of these methods, ahead of PKD (+2.0 AP), RM (+3.0 AP)."
    ]


def test_one_that_may_be_as_good_is_named():
    arms = study(crosskd=[33.0, 34.0, 35.0], pkd=[32.0, 34.5, 34.5], rm=[30.0, 31.0, 32.1])
    [text] = ranking(arms)
    assert text.startswith(
        "At equal steps CrossKD has the highest mean AP, ahead of RM (+3.0 AP); not"
    )
    assert text.endswith("told apart from PKD (+0.3 AP, 95 % interval -1.6 to +2.2): add seeds.")
    [text] = ranking(study(crosskd=[33.0, 34.0, 35.0], pkd=[33.0, 34.0, 35.0]))
    assert "ahead of" not in text and "PKD (+0.0 AP, 95 % interval +0.0 to +0.0)" in text


def test_a_longer_training_that_gives_more_is_told_with_it():
    [text] = ranking(study(crosskd=[32.0, 33.0, 33.5], pkd=[31.0, 32.0, 32.6]))
    assert text.endswith("given the time of the slowest, reaches 33.0 AP, CrossKD 32.8.")


def test_none_is_called_best_where_none_gains():
    assert ranking(study(crosskd=[29.0, 29.0, 29.0], pkd=[28.0, 28.1, 28.0])) == []
