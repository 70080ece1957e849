"""Feature imitation: a table worked by hand, where it acts, its adapters, the copied head."""

import copy

import pytest
import torch

from detdistill import (
    PKD,
    CrossKD,
    Distiller,
    FeatureImitation,
    UserError,
    as_detector,
    create_method,
)
from tests.detectors.test_views import BUILD, lively
from tests.distill import handmade
from tests.helpers import make_batch, narrow

R18 = ["atss_r18", "fcos_r18", "gfl_r18", "retinanet_r18"]


def distil(student, teacher, batch=None, **options):
    distiller = Distiller(student, teacher, {"feature": FeatureImitation(**options)}).train()
    return distiller, distiller(batch or make_batch())["feature/map"]


def test_the_mean_of_each_level_summed_over_levels():
    # Squares 1 + 4 + 9 + 16 over 4 elements, and 25 over 1: 7.5 + 25.
    teacher = [torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]]), torch.tensor([[[[5.0]]]])]
    student = [torch.zeros_like(level) for level in teacher]
    method = FeatureImitation()
    method.levels, method.depths = [0, 1], (0, 0)
    method.adapters = torch.nn.ModuleList([torch.nn.Identity()])
    step = handmade.step(handmade.output((), student), handmade.output((), teacher))
    assert method(step)["map"].item() == 32.5


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("at", ["neck", "cls", "box", "towers"])
@pytest.mark.parametrize("depth", [None, 0, 2])
def test_the_gradient_reaches_exactly_the_part_before_the_maps(name, at, depth):
    if at == "neck" and depth is not None:
        return
    student, teacher = narrow(name), narrow(name, seed=1)
    distiller, loss = distil(student, teacher, at=at, depth=depth, weight=2.0)
    assert loss > 0
    assert loss.item() == pytest.approx(2 * distiller.raw["feature/map"].item())
    loss.backward()
    for part in (student.backbone, student.fpn):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    for branch in ("cls", "box"):
        reach = 0 if at not in (branch, "towers") else 4 if depth is None else depth
        for i, block in enumerate(student.towers[branch].blocks):
            assert (block.conv.weight.grad is not None) == (i < reach), (branch, i)
    assert student.logits.weight.grad is None
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize(
    "options", [{}, {"at": "cls"}, {"at": "box", "depth": 3}, {"at": "towers"}]
)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(options):
    student = narrow().eval()
    method = {"feature": FeatureImitation(**options)}
    distiller = Distiller(student, copy.deepcopy(student), method).eval()
    assert distiller(make_batch())["feature/map"].item() == 0


def test_patterns_of_the_neck_are_pkd():
    student, teacher, batch = narrow().eval(), narrow(seed=1), make_batch()
    methods = {"feature": FeatureImitation(difference="pattern"), "pkd": PKD(weight=1.0)}
    losses = Distiller(student, teacher, methods).eval()(batch)
    assert losses["feature/map"] == losses["pkd/feature"] > 0


@pytest.mark.parametrize("difference", ["square", "pattern"])
def test_both_towers_are_the_sum_of_each(difference):
    losses = {}
    for at in ("cls", "box", "towers"):
        method = {"feature": FeatureImitation(at=at, difference=difference)}
        distiller = Distiller(narrow().eval(), narrow(seed=1), method).eval()
        losses[at] = distiller(make_batch())["feature/map"].item()
    assert losses["towers"] == pytest.approx(losses["cls"] + losses["box"])


def test_each_tower_has_its_adapters():
    student = narrow(tower_channels=8)
    distiller, loss = distil(student, narrow(seed=1), at="towers", adapter="per_level")
    loss.backward()
    adapters = distiller.methods["feature"].adapters
    assert len(adapters) == 10 and all(a.weight.grad is not None for a in adapters)
    assert len(distil(student, narrow(seed=1), at="towers")[0].methods["feature"].adapters) == 2


def test_towers_are_compared_after_their_activation_whatever_others_ask_for():
    student, teacher, batch = narrow().eval(), narrow(seed=1), make_batch()
    alone = Distiller(student, teacher, {"feature": FeatureImitation(at="cls")}).eval()
    others = {"crosskd": CrossKD(align_on="pre_act"), "feature": FeatureImitation(at="cls")}
    both = Distiller(student, teacher, others).eval()
    assert alone(batch)["feature/map"] == both(batch)["feature/map"]


def test_one_adapter_for_all_levels_where_widths_differ():
    distiller, loss = distil(narrow(fpn_channels=8), narrow(seed=1, fpn_channels=24))
    loss.backward()
    adapters = dict(distiller.methods["feature"].named_parameters())
    assert {k: tuple(v.shape) for k, v in adapters.items()} == {
        "adapters.0.weight": (24, 8, 1, 1),
        "adapters.0.bias": (24,),
    }
    assert all(p.grad.any() for p in adapters.values())
    equal, _ = distil(narrow(), narrow(seed=1))
    assert not list(equal.methods["feature"].parameters())


def test_an_adapter_per_level_even_where_widths_agree():
    distiller, loss = distil(narrow(), narrow(seed=1), adapter="per_level")
    loss.backward()
    weights = [adapter.weight for adapter in distiller.methods["feature"].adapters]
    assert [tuple(w.shape) for w in weights] == [(16, 16, 1, 1)] * 5
    assert all(w.grad.any() for w in weights)


def test_towers_of_unequal_width_and_depth_meet_at_their_ends():
    student, teacher = narrow(tower_channels=8, tower_depth=2), narrow(seed=1)
    distiller, loss = distil(student, teacher, at="box")
    assert loss > 0
    method = distiller.methods["feature"]
    assert method.depths == (2, 4)
    assert tuple(method.adapters[0].weight.shape) == (16, 8, 1, 1)
    _, loss = distil(narrow(tower_depth=0), narrow(seed=1), at="box")
    assert loss > 0


@pytest.mark.parametrize("name", R18)
def test_the_students_head_starts_as_the_teachers(name):
    student, teacher = narrow(name), narrow(name, seed=1)
    body = {k: v.clone() for k, v in student.state_dict().items()}
    Distiller(student, teacher, {"feature": FeatureImitation(transfer_head=True)})
    for key, value in student.state_dict().items():
        wanted = body if key.startswith(("backbone.", "fpn.")) else teacher.state_dict()
        assert torch.equal(value, wanted[key]), key
    assert any(not torch.equal(body[key], student.state_dict()[key]) for key in body)
    student.logits.weight.data.zero_()
    assert teacher.logits.weight.any()


def test_the_head_of_a_view_is_copied_without_its_body():
    student, teacher = (as_detector(lively(BUILD["retinanet_v1"](), seed=seed)) for seed in (0, 1))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    Distiller(student, teacher, {"feature": FeatureImitation(transfer_head=True)})
    assert list(before) == list(student.state_dict())
    for key, value in student.state_dict().items():
        wanted = before if key.startswith("model.backbone.") else teacher.state_dict()
        assert torch.equal(value, wanted[key]), key


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (
            {"tower_channels": 8},
            {},
            r"is \(68, 16, 3, 3\) in the teacher gfl_r18 and \(68, 8,",
        ),
        ({"tower_depth": 2}, {}, "and absent in the student gfl_r18"),
        ({"name": "atss_r18"}, {}, "deltas.bias is absent in the teacher gfl_r18"),
        ({"num_classes": 2}, {}, "transfer_head: the teacher gfl_r18 has 3 classes"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(student, teacher, message):
    student, teacher = narrow(**student), narrow(seed=1, **teacher)
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(UserError, match=message):
        Distiller(student, teacher, {"feature": FeatureImitation(transfer_head=True)})
    assert all(torch.equal(before[k], v) for k, v in student.state_dict().items())


@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_needs_no_boxes_and_no_classes_in_common(counts):
    _, loss = distil(narrow(), narrow("fcos_r18", 5, seed=1), make_batch(counts))
    assert loss > 0


def test_the_neck_needs_no_head_of_the_teacher(monkeypatch):
    student, teacher = narrow(), narrow(seed=1)
    monkeypatch.setattr(teacher, "head", lambda *_, **__: pytest.fail("the head ran"))
    distil(student, teacher)


def test_refusals():
    with pytest.raises(UserError, match="depth is 2, but the neck has none"):
        FeatureImitation(depth=2)
    with pytest.raises(UserError, match="depth is 5, but the towers of gfl_r18 have 4 blocks"):
        distil(narrow(), narrow(seed=1), at="cls", depth=5)
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {"feature": FeatureImitation()})
    for option in ("at", "adapter", "difference"):
        with pytest.raises(UserError, match=f"feature: {option} is 'none'; expected '"):
            FeatureImitation(**{option: "none"})
        with pytest.raises(UserError, match=f"method 'feature', option {option}"):
            create_method("feature", **{option: "none"})
    student = narrow()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="feature: the teacher's pyramid"):
        distil(student, narrow(seed=1))
