"""CrossKD and the Distiller: who learns, who does not, and what is refused."""

import copy
from itertools import permutations

import pytest
import torch

from detdistill import CrossKD, Distiller, UserError, create_method, list_methods
from detdistill.distill.adapters import align_statistics
from detdistill.distill.published import PUBLISHED
from tests.helpers import DENSE_R18 as FAMILIES
from tests.helpers import TWO_STAGE_R18, make_batch, narrow


def pair(name="gfl_r18", teacher_name=None, teacher=None, **student):
    return narrow(name, **student), narrow(teacher_name or name, seed=1, **(teacher or {}))


def step(student, teacher, batch=None, **options):
    distiller = Distiller(student, teacher, {"crosskd": CrossKD(**options)}).train()
    return distiller, distiller(batch or make_batch())


@pytest.mark.parametrize("other", ["pre_act", "post_act"])
def test_another_method_does_not_change_where_maps_are_aligned(other):
    student, teacher = pair()
    own = "post_act" if other == "pre_act" else "pre_act"
    _, alone = step(student, teacher, align_on=own)
    both = {"crosskd": CrossKD(align_on=own), "beside": CrossKD(align_on=other)}
    together = Distiller(student, teacher, both).train()(make_batch())
    assert together["crosskd/cls"].item() == pytest.approx(alone["crosskd/cls"].item(), rel=1e-6)
    assert together["beside/cls"].item() != pytest.approx(alone["crosskd/cls"].item(), rel=1e-4)


def kd_loss(losses):
    return sum(value for name, value in losses.items() if name.startswith("crosskd/"))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("depth", range(5))
@pytest.mark.parametrize("align_on", ["post_act", "pre_act"])
@pytest.mark.parametrize("align", [True, False])
def test_the_gradient_reaches_exactly_the_part_before_the_cut(name, depth, align_on, align):
    student, teacher = pair(name, teacher={"tower_depth": 4}, tower_depth=4)
    _, losses = step(student, teacher, depth=depth, align_on=align_on, align=align)
    kd_loss(losses).backward()
    for branch in ("cls", "box"):
        for i, block in enumerate(student.towers[branch].blocks):
            reached = block.conv.weight.grad is not None and block.conv.weight.grad.any()
            assert bool(reached) == (i < depth), (branch, i)
    assert student.logits.weight.grad is None
    for part in (student.fpn, student.backbone):
        assert all(p.grad is not None for p in part.parameters())
        assert any(p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_teacher_gets_no_gradient_and_never_changes(name):
    student, teacher = pair(name)
    before = copy.deepcopy(teacher.state_dict())
    distiller = Distiller(student, teacher, {"crosskd": CrossKD()}).train()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        sum(distiller(make_batch(seed=seed)).values()).backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert distiller.iteration == 3


def test_checkpoints_hold_the_student_and_adapters_but_no_teacher():
    student, teacher = pair(tower_channels=8)
    own = set(student.state_dict())
    distiller, _ = step(student, teacher)
    assert set(student.state_dict()) == own
    others = {k for k in distiller.state_dict() if not k.startswith("student.")}
    others.remove("_extra_state")
    assert others and all(k.startswith("methods.crosskd.adapters.") for k in others)
    teacher_parameters = {id(p) for p in teacher.parameters()}
    assert not teacher_parameters & {id(p) for p in distiller.parameters()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_finite_without_boxes(name, counts):
    distiller, losses = step(*pair(name), batch=make_batch(counts))
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    for parameter in distiller.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


def test_finite_when_the_teacher_is_sure_of_nothing():
    student, teacher = pair()
    with torch.no_grad():
        teacher.logits.bias.fill_(-200)  # every score is 0
    _, losses = step(student, teacher)
    assert kd_loss(losses).isfinite()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name):
    student = narrow(name).eval()
    if student.box_coding == "points":  # untrained, they coincide: a box without area
        torch.nn.init.normal_(student.refined_points.bias, std=2.0)
    distiller = Distiller(student, copy.deepcopy(student), {"crosskd": CrossKD()}).eval()
    losses = distiller(make_batch())
    assert losses["crosskd/cls"].item() == pytest.approx(0, abs=1e-4)
    assert losses["crosskd/box"].item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({"tower_channels": 8}, {}),
        ({"fpn_channels": 8}, {"fpn_channels": 24}),
        ({"tower_depth": 2}, {}),
        ({"tower_depth": 0}, {}),
        ({}, {"tower_depth": 2}),
        ({"fpn_extra": "c5"}, {"fpn_extra": "p5"}),
    ],
)
def test_unequal_pairs_just_work(student, teacher):
    distiller, losses = step(*pair(teacher=teacher, **student))
    kd_loss(losses).backward()
    for adapter in distiller.methods["crosskd"].adapters.parameters():
        assert adapter.grad.any()


def test_a_short_student_tower_is_taken_at_its_end():
    distiller, _ = step(*pair(tower_depth=2))
    method = distiller.methods["crosskd"]
    assert (method.depth, method.student_depth) == (3, 2)


@pytest.mark.parametrize(("name", "other"), list(permutations(FAMILIES, 2)))
def test_unlike_heads_meet_at_the_teachers(name, other):
    student, teacher = pair(name, other)
    distiller, losses = step(student, teacher)
    kd_loss(losses).backward()
    assert student.towers["cls"].blocks[0].conv.weight.grad.any()
    method = distiller.methods["crosskd"]
    assert method.loss.box_loss == PUBLISHED.get(teacher.family, PUBLISHED["retinanet"]).box_loss
    assert {f"crosskd/{term}" for term in method.weights} < set(losses)


@pytest.mark.parametrize(("cls", "box"), [(True, False), (False, True)])
def test_branch_switches(cls, box):
    _, losses = step(*pair(), cls=cls, box=box)
    assert {k for k in losses if k.startswith("crosskd/")} == (
        {"crosskd/cls"} if cls else {"crosskd/box"}
    )


def test_published_weights_and_raw_terms():
    for family, depth, weights in (
        ("gfl", 3, {"cls": 1.0, "box": 4.0}),
        ("retinanet", 3, {"cls": 1.0, "box": 1.0}),
        ("atss", 3, {"cls": 1.0, "box": 1.0, "quality": 1.0}),
        ("fcos", 2, {"cls": 0.4, "box": 0.75}),
    ):
        distiller, losses = step(*pair(f"{family}_r18"))
        method = distiller.methods["crosskd"]
        assert (method.depth, method.weights) == (depth, weights)
        for term, weight in weights.items():
            raw = distiller.raw[f"crosskd/{term}"].item() * weight
            assert losses[f"crosskd/{term}"].item() == pytest.approx(raw)
        assert set(distiller.raw) == set(losses)


@pytest.mark.parametrize(
    ("name", "options", "terms"),
    [
        ("atss_r18", {"box": False}, {"cls"}),  # its quality sits on the box tower
        ("atss_r18", {"cls": False}, {"box", "quality"}),
        ("atss_r18", {"quality": False}, {"cls", "box"}),
        ("atss_r18", {"cls": False, "box": False, "quality": True}, {"quality"}),
        ("fcos_r18", {"quality": True, "quality_weight": 0.5}, {"cls", "box", "quality"}),
        ("fcos_r18", {"cls": False, "box": False, "quality": True}, {"quality"}),
    ],
)
def test_the_quality_branch_can_be_chosen(name, options, terms):
    distiller, losses = step(*pair(name), **options)
    assert {k.removeprefix("crosskd/") for k in losses if k.startswith("crosskd/")} == terms
    kd_loss(losses).backward()
    method = distiller.methods["crosskd"]
    for branch in ("cls", "box"):
        reached = distiller.student.towers[branch].blocks[0].conv.weight.grad is not None
        assert reached == (branch in method.branches)
    if "quality_weight" in options:
        assert method.weights["quality"] == 0.5


def test_a_batch_of_fcos_without_boxes_weighs_like_one_with():
    distiller, empty = step(*pair("fcos_r18"), batch=make_batch((0, 0)))
    filled = distiller(make_batch())
    assert kd_loss(empty) < 100 * kd_loss(filled)


def test_quality_needs_such_a_branch():
    with pytest.raises(UserError, match="retinanet_r18 has no quality branch"):
        Distiller(*pair("retinanet_r18"), {"crosskd": CrossKD(quality=True)})


def test_alignment_gives_the_teachers_statistics():
    student, teacher = torch.randn(2, 3, 4, 5) * 7 + 2, torch.randn(2, 3, 4, 5) * 0.3 - 1
    aligned = align_statistics(student, teacher)
    torch.testing.assert_close(aligned.mean((0, 2, 3)), teacher.mean((0, 2, 3)))
    torch.testing.assert_close(aligned.std((0, 2, 3)), teacher.std((0, 2, 3)))


def test_alignment_of_a_single_element_passes_it_on():
    lonely = torch.randn(1, 3, 1, 1)
    assert align_statistics(lonely, torch.randn(1, 3, 1, 1)) is lonely


def test_alignment_of_a_dead_channel_has_a_finite_gradient():
    dead = torch.zeros(2, 3, 4, 4, requires_grad=True)
    align_statistics(dead, torch.randn(2, 3, 4, 4)).sum().backward()
    assert dead.grad.isfinite().all()


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        ({"num_classes": 3}, {"num_classes": 5}, {}, "teacher gfl_r18 has 5 classes, the student"),
        ({}, {}, {"depth": 5}, "depth is 5, but the towers of gfl_r18 have 4 blocks"),
        ({"tower_depth": 1}, {}, {"student_depth": 2}, "student_depth is 2"),
    ],
)
def test_what_cannot_work_is_refused_before_training(student, teacher, options, message):
    with pytest.raises(UserError, match=message):
        Distiller(*pair(teacher=teacher, **student), {"crosskd": CrossKD(**options)})


def test_kl_needs_distributions():
    with pytest.raises(UserError, match="needs distance distributions"):
        Distiller(*pair("retinanet_r18"), {"crosskd": CrossKD(box_loss="kl")})


@pytest.mark.parametrize("name", TWO_STAGE_R18)
def test_two_stage_detectors_are_refused(name):
    with pytest.raises(UserError, match=f"crosskd needs a dense teacher; {name} has no dense head"):
        Distiller(narrow(), narrow(name), {"crosskd": CrossKD()})
    with pytest.raises(UserError, match=f"crosskd needs a dense student; {name} has no dense head"):
        Distiller(narrow(name), narrow(), {"crosskd": CrossKD()})


def test_classes_in_another_order_are_refused():
    student, teacher = pair()
    student.classes, teacher.classes = ["a", "b", "c"], ["a", "c", "b"]
    with pytest.raises(UserError, match=r"in their order: detdistill\.match_classes"):
        Distiller(student, teacher, {"crosskd": CrossKD()})


def test_equal_names_do_not_hide_unequal_numbers_of_classes():
    student, teacher = narrow(num_classes=2), narrow()
    student.classes = teacher.classes = ["a", "b", "c"]
    with pytest.raises(UserError, match="gfl_r18 predicts 2 classes, but its `classes` name 3"):
        Distiller(student, teacher, {"crosskd": CrossKD()})


def test_names_may_be_a_tuple():
    student, teacher = pair()
    student.classes, teacher.classes = ("a", "b", "c"), ["a", "b", "c"]
    Distiller(student, teacher, {"crosskd": CrossKD()})


def test_levels_that_do_not_match_are_refused():
    student, teacher = pair()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match=r"strides \[8, 16, 32, 64, 128\]"):
        Distiller(student, teacher, {"crosskd": CrossKD()})


def test_a_label_beyond_the_classes_is_refused():
    with pytest.raises(UserError, match="label 7; the student has classes 0 to 2"):
        Distiller(narrow())(make_batch(counts=(9, 9), num_classes=8))


def test_no_teacher_and_the_same_teacher_are_refused():
    student = narrow()
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(student, None, {"crosskd": CrossKD()})
    with pytest.raises(UserError, match="same object"):
        Distiller(student, student, {"crosskd": CrossKD()})


def test_methods_by_name():
    assert "crosskd" in list_methods()
    assert create_method("crosskd", depth=2).depth == 2
    with pytest.raises(UserError, match="did you mean 'depth'"):
        create_method("crosskd", dept=2)
    with pytest.raises(UserError, match="option align_on"):
        create_method("crosskd", align_on="sometimes")
    for temperature in (0.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="option temperature"):
            create_method("crosskd", temperature=temperature)
    with pytest.raises(UserError, match="did you mean 'crosskd'"):
        create_method("croskd")
    with pytest.raises(UserError, match="distils nothing"):
        CrossKD(cls=False, box=False)
