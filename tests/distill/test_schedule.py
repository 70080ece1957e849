"""When a method acts: warm-up, start and stop."""

import pytest

import detdistill as dd
from detdistill.distill.schedule import Schedule
from detdistill.errors import UserError
from tests.helpers import make_batch, narrow


@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ({}, {0: 1, 10**6: 1}),
        ({"warmup": 2000}, {0: 0, 500: 0.25, 2000: 1, 9000: 1}),
        ({"start": 10, "stop": 20}, {0: 0, 9: 0, 10: 1, 19: 1, 20: 0}),
        ({"start": 10, "warmup": 4}, {10: 0, 11: 0.25, 14: 1}),
    ],
)
def test_the_factor_follows_the_iteration(given, factors):
    assert {step: Schedule(**given).factor(step) for step in factors} == factors


def distiller(methods):
    student = narrow()
    teacher = narrow(seed=1)
    return dd.Distiller(student, teacher, methods)


def test_the_warm_up_scales_the_weighted_terms_alone():
    model, batch = distiller({"pkd": dd.create_method("pkd", warmup=4)}), make_batch()
    for iteration, factor in ((1, 0.25), (4, 1.0)):
        model.iteration = iteration
        term = model(batch)["pkd/feature"]
        assert term.item() == pytest.approx(factor * 6 * model.raw["pkd/feature"].item())
        assert not model.resting


def test_a_silent_method_costs_no_teacher_and_ties_its_adapters(monkeypatch):
    student = narrow()
    teacher = narrow(fpn_channels=24)
    model = dd.Distiller(student, teacher, {"pkd": dd.create_method("pkd", start=5)})
    monkeypatch.setattr(teacher, "pyramid", lambda images: pytest.fail("the teacher ran"))
    terms = model(make_batch())
    assert terms["pkd/feature"].item() == 0 and model.resting == {"pkd/feature"}
    sum(terms.values()).backward()
    assert all(p.grad is not None for p in model.methods.parameters())


def test_pkd_alone_runs_the_teacher_to_its_pyramid(monkeypatch):
    model = distiller({"pkd": dd.PKD()})
    monkeypatch.setattr(model.teacher, "head", lambda *_, **__: pytest.fail("the head ran"))
    assert model(make_batch())["pkd/feature"] > 0


def test_methods_of_one_recipe_have_schedules_of_their_own():
    methods = {"crosskd": dd.create_method("crosskd", stop=3), "pkd": dd.create_method("pkd")}
    model, batch = distiller(methods), make_batch()
    model.iteration = 3
    terms = model(batch)
    assert model.resting == {"crosskd/cls", "crosskd/box"}
    assert terms["crosskd/cls"] == 0 and terms["pkd/feature"] > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"start": 5, "stop": 5}, "'crosskd': stop is 5 and start 5"),
        ({"warmup": -1}, "warmup"),
        ({"stop": 0}, "stop"),
        ({"strat": 1}, "did you mean"),
    ],
)
def test_impossible_schedules_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        dd.create_method("crosskd", **given)
