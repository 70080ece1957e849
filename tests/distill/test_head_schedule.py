"""When HEAD's parts act: warm-ups, start and stop, CKD's own, and that what rests costs nothing."""

import pytest

from detdistill import Distiller, UserError, create_method
from tests.distill.test_head import PAIRS, distil, reached
from tests.helpers import make_batch, narrow

CKD_PAIRS = [pair[:2] for pair in PAIRS if pair[:2] != ("fcos", "reppoints")]


def scheduled(student="retinanet", teacher="faster_rcnn", **options):
    """A distiller of which nothing has run yet."""
    models = [narrow(f"{name}_r18", seed=i) for i, name in enumerate((student, teacher))]
    return Distiller(*models, {"head": create_method("head", **options)}).train()


@pytest.mark.parametrize(("iteration", "share"), [(0, 0.0), (500, 0.25), (2000, 1.0)])
def test_akd_and_ckd_warm_up_but_the_assistant_does_not(iteration, share):
    distiller, losses = distil("retinanet", "faster_rcnn", iteration=iteration)
    for term, weight in distiller.methods["head"].weights.items():
        factor = 1.0 if term.startswith("assistant") else share
        wanted = distiller.raw[f"head/{term}"].item() * weight * factor
        assert losses[f"head/{term}"].item() == pytest.approx(wanted), term


def test_the_assistant_warms_up_where_published_or_asked_for():
    for student, teacher, options, warm in (
        ("retinanet", "faster_rcnn", {"assistant_warmup": True}, 0.25),
        ("retinanet", "faster_rcnn", {}, 1.0),
        ("fcos", "faster_rcnn", {}, 0.25),
        ("retinanet", "reppoints", {}, 0.25),
        ("faster_rcnn", "cascade_rcnn", {}, 0.25),
        ("retinanet", "reppoints", {"assistant_warmup": False}, 1.0),
    ):
        method = distil(student, teacher, **options)[0].methods["head"]
        truth = [term for term in method.weights if term.startswith("assistant")]
        assert {method.factor(term, 500) for term in truth} == {warm}


def test_start_and_stop_leave_the_assistant_learning():
    student, teacher = narrow("retinanet_r18"), narrow("faster_rcnn_r18", seed=1)
    method = create_method("head", start=10, stop=20, warmup=4)
    Distiller(student, teacher, {"head": method})
    for iteration, factor in ((9, 0.0), (11, 0.25), (14, 1.0), (20, 0.0)):
        assert method.factor("akd_1", iteration) == factor
        assert method.factor("assistant_cls", iteration) == 1.0


@pytest.mark.parametrize(
    ("options", "akd", "ckd"),
    [
        # Whatever is not given is AKD's.
        ({"start": 10, "stop": 20, "warmup": 4}, {9: 0, 11: 0.25, 20: 0}, {9: 0, 11: 0.25, 20: 0}),
        ({"ckd_stop": 3000}, {500: 0.25, 3000: 1}, {500: 0.25, 2999: 1, 3000: 0}),
        ({"ckd_warmup": 0}, {0: 0, 500: 0.25}, {0: 1, 500: 1}),
        ({"warmup": 4, "ckd_start": 30}, {1: 0.25, 4: 1}, {29: 0, 31: 0.25, 34: 1}),
        ({"warmup": 0, "stop": 20, "ckd_stop": 40}, {19: 1, 20: 0}, {20: 1, 39: 1, 40: 0}),
    ],
)
def test_ckd_has_a_schedule_of_its_own(options, akd, ckd):
    method = scheduled(**options).methods["head"]
    assert {step: method.factor("akd_2", step) for step in akd} == akd
    assert {step: method.factor("ckd", step) for step in ckd} == ckd
    assert {method.factor("assistant_cls", step) for step in (0, 20, 3000)} == {1.0}


@pytest.mark.parametrize(("student", "teacher"), CKD_PAIRS)
def test_ckd_that_is_over_costs_nothing(student, teacher, monkeypatch):
    distiller = scheduled(student, teacher, ckd=True, warmup=0, ckd_stop=5)
    names = set(distiller(make_batch()))
    link = distiller.methods["head"].link
    projectors = [m for n, m in link.named_children() if n.startswith("projector")]
    monkeypatch.setattr("detdistill.distill.head.cross_kind_loss", pytest.fail)
    for projector in (p for m in projectors for p in m.modules()):
        monkeypatch.setattr(projector, "forward", lambda *_: pytest.fail("CKD was computed"))
    distiller.iteration = 5
    losses = distiller(make_batch())
    assert set(losses) == names
    resting = {name for name in names if name.startswith("head/ckd")}
    assert distiller.resting == resting and not any(losses[name] for name in resting)
    assert all(losses[name] > 0 for name in names if "akd" in name)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert projectors and not any(reached(projector) for projector in projectors)


@pytest.mark.parametrize(
    "options", [{"stop": 5}, {"ckd_stop": 5, "akd": False}, {"stop": 5, "ckd_stop": 5}]
)
@pytest.mark.parametrize("teacher", ["faster_rcnn", "reppoints"])
def test_the_teacher_rests_when_nothing_is_distilled_any_more(teacher, options, monkeypatch):
    distiller = scheduled("retinanet", teacher, ckd=True, warmup=0, **options)
    names = set(distiller(make_batch()))
    monkeypatch.setattr(distiller.teacher, "pyramid", lambda _: pytest.fail("the teacher ran"))
    distiller.iteration = 5
    losses = distiller(make_batch())
    assert set(losses) == names
    assert distiller.resting == {name for name in names if "akd" in name or "ckd" in name}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())
    assert reached(distiller.methods["head"].link.assistant)


def test_ckd_acts_while_akd_rests():
    distiller = scheduled(warmup=0, stop=5, ckd_stop=9)
    distiller.iteration = 5
    losses = distiller(make_batch())
    assert distiller.resting == {"head/akd_1", "head/akd_2"}
    assert losses["head/ckd"] > 0


@pytest.mark.parametrize(
    ("teacher", "options", "message"),
    [
        (
            "faster_rcnn",
            {"ckd_stop": 9, "ckd_start": 9},
            "CKD stops at step 9 and starts at",
        ),
        ("faster_rcnn", {"ckd_stop": 9, "start": 10}, "stops at step 9 and starts at step 10"),
        ("faster_rcnn", {"ckd_start": 30, "stop": 20}, "stops at step 20 and starts at step 30"),
        ("faster_rcnn", {"ckd_stop": 9, "ckd": False}, "ckd_stop is 9, but CKD is off"),
        ("reppoints", {"ckd_warmup": 0}, "ckd_warmup is 0, but CKD is off, .* set ckd to true"),
    ],
)
def test_a_schedule_by_which_ckd_never_acts_is_refused(teacher, options, message):
    with pytest.raises(UserError, match=message) as caught:
        scheduled(teacher=teacher, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ckd_stop": 0}, "option ckd_stop"),
        ({"ckd_start": -1}, "option ckd_start"),
        ({"ckd_warmup": 0.5}, "option ckd_warmup"),
        ({"ckd_stopp": 5}, "did you mean 'ckd_stop'"),
    ],
)
def test_options_of_ckds_schedule_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        create_method("head", **options)
