"""The measured step: gradients against plain autograd, and what a trial leaves alone."""

import math

import pytest
import torch

from detdistill import create_method
from detdistill.distill import Distiller
from detdistill.doctor.pair import build_arm
from detdistill.doctor.step import (
    Norms,
    full_strength,
    gradient_numbers,
    measure_cost,
    measure_gradients,
    take_first_steps,
)
from detdistill.doctor.trial import ALONE, Trial
from detdistill.structures import Batch
from tests.doctor.conftest import levels
from tests.helpers import make_batch, narrow

CPU = torch.device("cpu")


def arm_of(arm, student="gfl_r18", teacher="gfl_r18"):
    distiller = build_arm(narrow(student), narrow(teacher, seed=1), arm)
    return distiller.train()


def norm_of(distiller, prefix):
    found = [
        p.grad.double().square().sum()
        for name, p in distiller.student.named_parameters()
        if p.grad is not None and name.startswith(prefix)
    ]
    return math.sqrt(float(sum(found)))


def test_norms():
    norms = Norms(backbone=3.0, fpn=4.0, head=12.0)
    assert (norms.body, norms.total) == (5.0, 13.0)


def test_gradients_are_those_of_backward(recipe):
    batch = make_batch((2, 1))
    found = measure_gradients(arm_of({"crosskd": {}}), batch, recipe, 0)
    again = arm_of({"crosskd": {}})
    terms = again(batch)
    assert {name: t.weighted for name, t in found.terms.items()} == {
        name: pytest.approx(float(v.detach()))
        for name, v in terms.items()
        if name.startswith("crosskd/")
    }
    terms["crosskd/cls"].backward(retain_graph=True)
    term = found.terms["crosskd/cls"].gradient
    assert term.backbone == pytest.approx(norm_of(again, "backbone."), rel=1e-3)
    assert term.fpn == pytest.approx(norm_of(again, "fpn."), rel=1e-3)
    again.zero_grad()
    sum(v for name, v in terms.items() if name.startswith("task/")).backward()
    assert found.task.body == pytest.approx(
        math.hypot(norm_of(again, "backbone."), norm_of(again, "fpn.")), rel=1e-3
    )
    assert found.task.head > 0


def test_a_method_is_the_sum_of_its_terms(recipe):
    found = measure_gradients(arm_of({"crosskd": {}, "pkd": {}}), make_batch(), recipe, 0)
    assert set(found.methods) == {"crosskd", "pkd"}
    parts = [found.terms[f"crosskd/{term}"].gradient.body for term in ("cls", "box")]
    assert max(parts) - min(parts) <= found.methods["crosskd"].body <= sum(parts) * (1 + 1e-6)
    assert found.methods["pkd"] == pytest.approx(found.terms["pkd/feature"].gradient)
    assert found.methods["pkd"].head == 0  # PKD looks at the pyramid


def test_measuring_leaves_no_gradient(recipe):
    distiller = arm_of({"pkd": {}})
    measure_gradients(distiller, make_batch(), recipe, 0)
    assert all(p.grad is None for p in distiller.parameters())


def test_methods_are_measured_at_full_strength(recipe):
    late = {"start": 40, "warmup": 20}
    distiller = arm_of({"pkd": late})
    methods = [create_method("pkd", **late), create_method("crosskd", stop=30)]
    assert full_strength(methods) == 60
    assert full_strength([create_method("pkd", warmup=50, stop=20)]) == 19
    head = create_method("head", warmup=50, ckd_start=70)
    head.prepare(narrow("retinanet_r18"), narrow("faster_rcnn_r18"))
    assert full_strength([head]) == 120
    assert full_strength([]) == 0
    found = measure_gradients(distiller, make_batch(), recipe, 60)
    term = found.terms["pkd/feature"]
    assert term.weighted == pytest.approx(term.raw * 6.0)
    silent = measure_gradients(distiller, make_batch(), recipe, 10)
    assert silent.resting == {"pkd/feature"} and silent.methods["pkd"].body == 0


def test_first_steps_change_the_student(recipe):
    distiller = Distiller(narrow()).train()
    before = distiller.student.state_dict()["backbone.body.conv1.weight"].clone()
    steps = take_first_steps(distiller, [make_batch()], recipe, CPU)
    after = distiller.student.state_dict()["backbone.body.conv1.weight"]
    assert steps > 0 and not after.equal(before) and after.isfinite().all()


@pytest.mark.parametrize("settings", [{}, {"precision": "bf16", "channels_last": True}])
def test_cost(recipe, settings):
    settings = {**settings, "accumulate": 2, "optimizer": "adamw"}
    cost = measure_cost(
        arm_of({"crosskd": {}}), make_batch(), recipe.model_copy(update=settings), CPU, 0
    )
    assert cost.seconds > 0 and cost.peak_bytes is None and cost.finite


def test_biases_learn_at_their_own_rate(recipe, monkeypatch):
    step, ratios = torch.optim.SGD.step, []

    def watched(optimizer, *args, **kwargs):
        lowest = min(group["lr"] for group in optimizer.param_groups)
        ratios.append([group["lr"] / lowest for group in optimizer.param_groups])
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    monkeypatch.setattr("detdistill.doctor.step.FIRST_STEPS", 1)
    settings = recipe.model_copy(update={"bias_lr_factor": 3.0})
    take_first_steps(Distiller(narrow()).train(), [make_batch()], settings, CPU)
    measure_cost(Distiller(narrow()).train(), make_batch(), settings, CPU, 0)
    assert len(ratios) > 1 and all(found == pytest.approx([1, 3]) for found in ratios)


def test_numbers_know_no_infinity(recipe):
    batch = make_batch()
    batch = Batch(batch.images.float() * math.inf, batch.sizes, batch.targets)
    found = measure_gradients(Distiller(narrow()).train(), batch, recipe, 0)
    assert gradient_numbers(found)["task_terms"]["task/cls"] is None


def test_a_trial_leaves_student_and_teacher_alone(recipe):
    student, teacher = narrow(), narrow(seed=1)
    models = (student, teacher)
    before = [{n: v.clone() for n, v in model.state_dict().items()} for model in models]
    trial = Trial(recipe, CPU, [make_batch()], 100)
    [alone] = trial.start(student)
    assert trial.ready and "the student alone, after" in alone.text
    found = trial.check("crosskd", teacher, {"crosskd": {}}, trained=True)
    assert "times the student alone" in found[0].text and found[0].details
    assert set(trial.numbers) == {ALONE, "crosskd"}
    for model, state in zip(models, before, strict=True):
        assert all(value.equal(state[name]) for name, value in model.state_dict().items())


def test_a_dead_term_is_looked_for_in_further_batches(recipe):
    """Without any object there is no candidate to rank."""
    empty, full = make_batch((0, 0)), make_batch((2, 1))
    cases = (([empty, full], False, 2), ([empty] * 2, True, 2), ([full], False, 1))
    for batches, dead, seen in cases:
        trial = Trial(recipe, CPU, batches, 100)
        trial.start(narrow())
        findings = trial.check("rm", narrow(seed=1), {"rm": {}}, trained=True)
        assert len(trial.numbers["rm"]["batches"]) == seen
        assert any("exactly 0" in f.text for f in findings) is dead


def test_memory_that_does_not_suffice(recipe, monkeypatch):
    def exhausted(*given):
        raise torch.OutOfMemoryError

    trial = Trial(recipe, CPU, [make_batch()], 100)
    trial.start(narrow())
    monkeypatch.setattr("detdistill.doctor.trial.measure_gradients", exhausted)
    [found] = trial.check("pkd", narrow(seed=1), {"pkd": {}}, trained=True)
    assert found.level == "problem" and "accumulate=2" in found.advice
    other = Trial(recipe, CPU, [make_batch()], 100)
    assert levels(other.start(narrow())) == ["problem"] and not other.ready


def test_times_of_one_process_of_several(recipe):
    text = Trial(recipe, CPU, [make_batch()], 100).about_times().text
    assert "CPU" in text and "processes" not in text
    two = recipe.model_copy(update={"devices": 2})
    assert "one of 2 processes" in Trial(two, CPU, [make_batch()], 100).about_times().text
