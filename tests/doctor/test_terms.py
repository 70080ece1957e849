"""Verdicts on numbers that are written down here."""

import math
from dataclasses import replace

import pytest

from detdistill import create_method, list_methods
from detdistill.doctor.pair import build_arm, methods_of
from detdistill.doctor.step import Cost, Gradients, Norms, Term
from detdistill.doctor.terms import (
    check_arm,
    check_plain,
    describe_cost,
    ratio,
    suggest_weight,
    term_table,
    weight_option,
)
from tests.doctor.conftest import levels
from tests.helpers import narrow

PLAIN = Cost(0.5, None, True)
COST = Cost(1.0, None, True)
TASK = Norms(3.0, 4.0, 1.0)


def gradients_of(cls=0.5, box=0.5, raw=1.0, **changes):
    """CrossKD's two terms, with gradients into the backbone alone."""
    terms = {
        "crosskd/cls": Term(raw, raw, Norms(cls, 0.0, 0.0)),
        "crosskd/box": Term(raw, 4 * raw, Norms(box, 0.0, 0.0)),
    }
    methods = {"crosskd": Norms(cls + box, 0.0, 0.0)}
    found = Gradients(TASK, methods, {"task/cls": 1.0}, terms, frozenset(), 0)
    return replace(found, **changes)


@pytest.fixture(scope="module")
def methods():
    return methods_of(build_arm(narrow(), narrow(seed=1), {"crosskd": {}}))


def check(methods, *found, cost=COST, trained=True):
    return check_arm("crosskd", methods, found, cost, PLAIN, 3600, trained=trained)


def test_a_good_step(methods):
    [found] = check(methods, gradients_of())
    assert found.level == "ok"
    assert "1 s a step (2.0 times the student alone), about 1 h 00 min for 3600" in found.text
    assert "0.2 times the task's" in found.text
    assert len(found.details) == 3


def test_cost_on_a_gpu():
    assert describe_cost(Cost(0.25, 3 * 2**30, True), None, 100) == (
        "0.25 s a step, about 25 s for 100 steps, 3.0 GiB of GPU memory"
    )


def test_a_dead_method_and_a_dead_term(methods):
    dead = gradients_of(0, 0, raw=0.0)
    _, found = check(methods, dead, dead)
    assert found.level == "problem" and "exactly 0 on 2 batches" in found.text
    good = gradients_of()
    half = replace(good, terms={**good.terms, "crosskd/box": dead.terms["crosskd/box"]})
    _, found = check(methods, half)
    assert found.level == "warning" and "crosskd/box" in found.text
    assert levels(check(methods, half, good)) == ["ok"]
    resting = replace(dead, resting=frozenset(dead.terms))
    assert levels(check(methods, resting)) == ["ok"]
    assert any("resting" in line for line in check(methods, resting)[0].details)


def test_an_untrained_teacher_is_not_judged(methods):
    dead = gradients_of(0, 0, raw=0.0)
    assert levels(check(methods, dead, trained=False)) == ["ok"]


def test_terms_that_do_not_reach_the_student(methods):
    _, found = check(methods, gradients_of(0.0, 0.0))
    assert found.level == "problem" and "none of their gradient" in found.text


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_terms_that_are_not_finite(methods, value):
    bad = gradients_of()
    bad.terms["crosskd/box"] = Term(value, value, Norms(value, value, value))
    _, found = check(methods, bad, trained=False)
    assert found.level == "problem" and "crosskd/box" in found.text
    _, found = check(methods, gradients_of(), cost=replace(COST, finite=False))
    assert found.level == "problem" and "bf16" in found.advice


def test_too_strong_and_too_weak(methods):
    _, strong = check(methods, gradients_of(cls=100.0, box=900.0))
    assert strong.level == "warning" and "2e+02 times" in strong.text
    # The published weight of the box, 4, over 200.
    assert "--set methods.crosskd.box_weight=0.02" in strong.advice
    _, weak = check(methods, gradients_of(cls=0.001, box=0.0))
    assert "next to nothing" in weak.text and "crosskd.cls_weight=5000" in weak.advice


@pytest.mark.parametrize(
    ("method", "term", "option"),
    [
        ("crosskd", "cls", "cls_weight"),
        ("pkd", "feature", "weight"),
        ("head", "akd_1_2", "akd_weight"),
        ("head", "ckd", "ckd_weight"),
        ("head", "assistant_cls", None),
        ("tf_head", "ckd_rcnn", "rcnn_weight"),
        ("soft_label", "cls", "weight"),
    ],
)
def test_which_option_is_a_terms_weight(method, term, option):
    assert weight_option(create_method(method), term) == option


@pytest.mark.parametrize("method", list_methods())
def test_every_method_has_a_weight_to_suggest(method):
    found = create_method(method)
    found.weights = {"map": 1.0}
    assert "weight" in suggest_weight(method, found, "map", 500.0)


def test_terms_without_a_weight_of_their_own():
    found = create_method("tf_head")
    found.weights = {"ckd_fcos": 1.0, "fcos_cls": 1.0}
    found.truth_terms = frozenset({"fcos_cls"})
    advice = suggest_weight("tf_head", found, "ckd_fcos", 500.0)
    assert "a weight of 0.002" in advice and "dense_weight or rcnn_weight" in advice
    assert "has no weight to change" in suggest_weight("tf_head", found, "fcos_cls", 500.0)


def alone(cost=PLAIN, **changes):
    [found] = check_plain([gradients_of(**changes)], cost, 100, 20)
    return found.level, found.text


def test_the_student_alone():
    level, text = alone()
    assert level == "ok" and "after 20 steps: task/cls 1; " in text
    level, text = alone(task_terms={"task/cls": math.nan})
    assert level == "problem" and "task/cls is not finite" in text
    level, text = alone(task=Norms(0.0, 0.0, 1.0))
    assert level == "problem" and "nothing reaches" in text
    assert alone(replace(PLAIN, finite=False))[0] == "problem"
    level, text = alone(task_terms={"task/cls": 1.0, "task/box": 0.0})
    assert level == "problem" and "exactly 0 on 1 batch: task/box" in text
    some = [gradients_of(task_terms={"task/box": value}) for value in (0.0, 1.0)]
    assert levels(check_plain(some, PLAIN, 100, 20)) == ["ok"]


def test_ratios_and_the_table():
    assert ratio(1.0, 2.0) == 0.5
    assert all(math.isnan(ratio(*pair)) for pair in ((1.0, 0.0), (math.inf, 1.0), (1.0, math.nan)))
    header, cls, box = term_table(gradients_of())
    assert header.split()[0] == "term"
    assert cls.split() == ["crosskd/cls", "1", "1", "0.17", "0", "0"]
    assert box.split()[:3] == ["crosskd/box", "1", "4"]
