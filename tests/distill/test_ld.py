"""LD: tables worked by hand, regions by their definition, whom it reaches, what is refused."""

import copy
import statistics
from math import log

import pytest
import torch

from detdistill import LD, Batch, Distiller, UserError, create_method
from detdistill.parts.assigners import possible_iou, valuable_region
from detdistill.structures import DenseOutput, Predictions, Pyramid, Targets
from tests.distill import handmade
from tests.helpers import make_batch, narrow

TERMS = ("main", "vlr", "cls", "feature")
ALONE = {"cls": False, "vlr": False, "feature": False}

# Two images of two levels, 1 x 3 cells and 1 x 1, one anchor each; 2 bins, 2 classes, 2 channels.
# IoU with the box of image 0, 8 x 8:     1/2, 1/4, 0 and 1
# IoU with the box of image 1, 8 x 3:     3/4, 2/3, 0 and 3/8
ANCHORS = [
    torch.tensor([[0.0, 0, 8, 4], [0, 0, 8, 2], [100, 100, 108, 108]]),
    torch.tensor([[0.0, 0, 8, 8]]),
]
BOXES = torch.tensor([[[0.0, 0, 8, 8]], [[0, 0, 8, 3]]])
# The student is 0 everywhere. Softened, the teacher says 3/4 and 1/4 where it is not 0, as well.
# KL = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812; times T^2, over 2 bins or classes:
SIDE = 0.130812 * 100 / 2
CLASS = 0.130812 * 4 / 2
UNSURE = 10 * log(3), 2 * log(3)  # logits that make 3/4 at the temperatures 10 and 2


def levels(rows, channels):
    """(image, cell) -> values, as maps (2, channels, 1, 3) and (2, channels, 1, 1), 0 elsewhere."""
    flat = torch.zeros(2, 4, channels)
    for (image, cell), values in rows.items():
        flat[image, cell] = torch.tensor(values)
    return [part.transpose(1, 2)[:, :, None].contiguous() for part in flat.split([3, 1], 1)]


def output(logits, boxes, features):
    """All by (image, cell); see `levels`."""
    predictions = Predictions(
        [level[:, None] for level in levels(logits, 2)],
        [level[:, None] for level in levels(boxes, 8)],
    )
    return DenseOutput(predictions, {}, ANCHORS, Pyramid(levels(features, 2), (8, 16)))


def by_hand(matched, *, student_logits=(), logits=(), boxes=(), features=(), beyond=(), **options):
    """Raw terms of a student that is 0 but for its own logits; `beyond` are cells of no image."""
    sides = output(dict(student_logits), {}, {}), output(dict(logits), dict(boxes), dict(features))
    assignment = handmade.assignment(matched, [[0], [0]])
    for cell in beyond:
        assignment.weights[cell] = 0
    step = handmade.step(*sides, [[0], [0]], of_teacher=assignment)
    step.targets = Targets(BOXES, step.targets.labels, ((32, 32),) * 2)
    method = LD(**{**ALONE, **options})
    method.adapter = torch.nn.Identity()
    return {term: value.item() for term, value in method(step).items()}


def sides(*differ):
    """Logits of 2 bins of the 4 sides: those that the student does not share."""
    return [value for side in range(4) for value in (UNSURE[0] * (side in differ), 0.0)]


BOTH = [[0, -1, -1, -1], [-1, -1, -1, 0]]  # a positive on each level


def test_main_by_hand():
    # Image 0: one side, at the student's best score 1/2. Image 1: two sides, 0.8.
    boxes = {(0, 0): sides(0), (1, 3): sides(1, 3), (0, 1): sides(0, 1, 2, 3)}
    found = by_hand(BOTH, student_logits={(1, 3): [log(4), -1.0]}, boxes=boxes)
    assert set(found) == {"main"}
    # Two images count as they are: the sum over both, over 4.
    assert found["main"] == pytest.approx((SIDE * 0.5 + 2 * SIDE * 0.8) / 4, rel=1e-4)


def test_main_knows_no_scores_of_the_teacher():
    boxes = {(0, 0): sides(0)}
    found = [by_hand(BOTH, boxes=boxes, logits={(0, 0): [x, 0.0]})["main"] for x in (0.0, 5.0)]
    assert found[0] == found[1] == pytest.approx(SIDE * 0.5 / 4, rel=1e-4)


def test_vlr_by_hand():
    # Image 0: mean of 1/2, 1/4, 0 and 1 is 0.4375, the unbiased deviation 0.426956: t = 0.864456.
    # DIoU is 1/2 - 4/128 = 0.46875 and 1/4 - 9/128 = 0.179688; of t a share of 0.54 and 0.208.
    # Image 1: mean of 3/4, 2/3, 0 and 3/8 is 0.447917, deviation 0.339150, t = 0.787067.
    # DIoU is 3/4 - 0.25/80 = 0.746875, 2/3 - 0.25/73 = 0.663242 and 3/8 - 6.25/128 = 0.326172.
    boxes = {(0, 0): sides(0), (0, 1): sides(1, 2), (0, 3): sides(0, 1), (1, 1): sides(3)}
    found = by_hand(BOTH, boxes=boxes, vlr=True)
    assert set(found) == {"main", "vlr"}
    assert found["vlr"] == pytest.approx(SIDE * (0.5 + 2 / 3) / 16, rel=1e-4)
    found = by_hand(BOTH, boxes=boxes, vlr=True, gamma=0.2)
    assert found["vlr"] == pytest.approx(SIDE * (0.5 + 2 * 0.25 + 2 / 3) / 16, rel=1e-4)
    found = by_hand(BOTH, boxes=boxes, vlr=True, gamma=0.6)
    assert found["vlr"] == pytest.approx(SIDE * (2 / 3) / 16, rel=1e-4)


def test_cls_by_hand():
    # Two positives on level 0, of which the student agrees on one; one on level 1.
    matched = [[0, -1, -1, -1], [-1, 0, -1, 0]]
    logits = {(0, 0): [UNSURE[1], 0.0], (1, 3): [0.0, UNSURE[1]], (0, 2): [9.0, -9.0]}
    found = by_hand(matched, logits=logits, cls=True)
    assert found["cls"] == pytest.approx(CLASS / 2 + CLASS, rel=1e-4)
    assert by_hand(BOTH, logits=logits, cls=True)["cls"] == pytest.approx(2 * CLASS, rel=1e-4)


FEATURES = {
    # Mean squares 2 and 5 in image 1 on level 0, 5 in image 0 on level 1; beyond the region the
    # rest, also 1/2 and 3/8, which are just half of the best IoU.
    **{(1, 0): [2.0, 0.0], (1, 1): [3.0, 1.0], (0, 3): [1.0, 3.0]},
    **{(0, 0): [50.0, 0.0], (0, 1): [50.0, 0.0], (1, 2): [50.0, 0.0], (1, 3): [50.0, 0.0]},
}


@pytest.mark.parametrize(
    ("matched", "wanted"),
    [
        (BOTH, 3.5 + 5),
        # A level without a positive has no part in it.
        ([[0, 0, -1, -1], [-1] * 4], 3.5),
        ([[-1, -1, -1, 0], [-1] * 4], 5),
        ([[-1] * 4] * 2, 0),
    ],
)
def test_feature_by_hand(matched, wanted):
    found = by_hand(matched, features=FEATURES, feature=True)
    assert set(found) == {"main", "feature"}
    assert found["feature"] == pytest.approx(wanted)


def test_cells_beyond_an_image_are_in_no_region():
    # Without the first cell of image 1 its best IoU is 2/3, of which 3/8 is more than half.
    found = by_hand(BOTH, features=FEATURES, feature=True, beyond=[(1, 0)])
    assert found["feature"] == pytest.approx(5 + (5 + 50**2 / 2) / 2)


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_temperatures_divide_the_logits_and_their_squares_multiply(temperature):
    boxes = {(0, 0): [value * temperature / 10 for value in sides(0)]}
    found = by_hand(BOTH, boxes=boxes, temperature=temperature)
    assert found["main"] == pytest.approx(SIDE * (temperature / 10) ** 2 * 0.5 / 4, rel=1e-4)
    logits = {(0, 0): [temperature * log(3), 0.0]}
    found = by_hand(BOTH, logits=logits, cls=True, cls_temperature=temperature)
    assert found["cls"] == pytest.approx(CLASS * (temperature / 2) ** 2, rel=1e-4)


def iou_and_penalty(one, other):
    """IoU of two boxes, and what DIoU takes off; by the definitions."""
    width, height = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    overlap = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    away = [(one[i] + one[i + 2] - other[i] - other[i + 2]) / 2 for i in (0, 1)]
    hull = [max(one[i + 2], other[i + 2]) - min(one[i], other[i]) for i in (0, 1)]
    penalty = (away[0] ** 2 + away[1] ** 2) / (hull[0] ** 2 + hull[1] ** 2)
    return overlap / (sum(areas) - overlap), penalty


def weights_by_definition(anchors, valid, boxes, gamma):
    """VLR weights of one image's anchors, one box and one anchor at a time."""
    flat, weights = [a for level in anchors for a in level], [0.0] * len(valid)
    for box in boxes:
        both, candidates, start = [iou_and_penalty(anchor, box) for anchor in flat], [], 0
        for level in anchors:
            cells = [start + i for i in range(len(level)) if valid[start + i]]
            away = {
                i: sum((flat[i][k] + flat[i][k + 2] - box[k] - box[k + 2]) ** 2 for k in (0, 1))
                for i in cells
            }
            candidates += sorted(cells, key=away.__getitem__)[:9]
            start += len(level)
        near = [both[i][0] for i in candidates]
        threshold = statistics.mean(near) + statistics.stdev(near)
        for i, (iou, penalty) in enumerate(both):
            if valid[i] and gamma * threshold <= iou - penalty < threshold:
                weights[i] = max(weights[i], iou)
    return weights


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.7])
def test_the_valuable_region_by_its_definition(gamma):
    # The last image has cells beyond it, which overlap its last box, and a slot without a box.
    batch, model = make_batch((3, 0, 2)), narrow()
    batch.targets[2]["boxes"][1] = torch.tensor([30.0, 8, 62, 40])
    targets = batch.padded_targets()
    with torch.no_grad():
        out = model(batch)
    valid = model.valid_cells(out, targets)
    iou = possible_iou(torch.cat(out.anchors), valid, targets)
    found = valuable_region(out.anchors, valid, targets, iou, gamma=gamma)
    assert not valid.all()
    for i, target in enumerate(batch.targets):
        anchors = [level.double().tolist() for level in out.anchors]
        boxes = target["boxes"].double().tolist()
        wanted = weights_by_definition(anchors, valid[i].tolist(), boxes, gamma)
        assert any(wanted) == bool(boxes)
        assert found[i].tolist() == pytest.approx(wanted, abs=1e-5)


def distil(student, teacher, batch=None, **options):
    handmade.spread_predictions(student, teacher)
    distiller = Distiller(student, teacher, {"ld": LD(**options)}).train()
    losses = distiller(batch or make_batch((4, 3)))
    return distiller, {k[3:]: value for k, value in losses.items() if k.startswith("ld/")}


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("main", {"backbone", "fpn", "towers.box", "distributions", "scales"}),
        ("vlr", {"backbone", "fpn", "towers.box", "distributions", "scales"}),
        ("cls", {"backbone", "fpn", "towers.cls", "logits"}),
        ("feature", {"backbone", "fpn"}),
    ],
)
def test_which_parts_a_term_reaches(term, reached):
    student, teacher = narrow(fpn_channels=8), narrow(seed=1, fpn_channels=24)
    distiller, losses = distil(student, teacher)
    assert losses[term] > 0
    losses[term].backward()
    parts = ["backbone", "fpn", "towers.box", "distributions", "scales", "towers.cls", "logits"]
    for part in parts:
        grads = [p.grad for p in student.get_submodule(part).parameters() if p.grad is not None]
        assert any(grad.any() for grad in grads) == (part in reached), part
    adapter = distiller.methods["ld"].adapter.weight
    assert adapter.shape == (24, 8, 1, 1)
    assert (adapter.grad is not None and bool(adapter.grad.any())) == (term == "feature")
    assert all(p.grad is None for p in teacher.parameters())


def test_equal_widths_need_no_adapter():
    distiller, _ = distil(narrow(), narrow(seed=1))
    assert not list(distiller.methods["ld"].parameters())
    distiller, _ = distil(narrow(fpn_channels=8), narrow(seed=1), feature=False)
    assert not list(distiller.methods["ld"].parameters())


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    student = narrow().eval()
    distiller = Distiller(student, copy.deepcopy(student), {"ld": LD()}).eval()
    losses = distiller(make_batch())
    for term in TERMS:
        assert losses[f"ld/{term}"].item() == pytest.approx(0, abs=1e-5)


def test_the_same_images_twice_change_nothing():
    student, teacher, once = narrow(), narrow(seed=1), make_batch((4, 3))
    distiller, losses = distil(student.eval(), teacher, once)
    twice = Batch(
        once.images.repeat(2, 1, 1, 1), [*once.sizes] * 2, [*once.targets] * 2, [0, 1, 2, 3]
    )
    again = distiller(twice)
    for term in TERMS:
        assert losses[term] > 0
        assert again[f"ld/{term}"].item() == pytest.approx(losses[term].item(), rel=1e-4), term


@pytest.mark.parametrize("counts", [(0, 0), (3, 0)])
def test_images_without_boxes(counts):
    student = narrow(fpn_channels=8)
    distiller, losses = distil(student, narrow(seed=1), make_batch(counts))
    assert set(losses) == set(TERMS)
    assert all(value.isfinite() and (value == 0) == (counts == (0, 0)) for value in losses.values())
    sum(losses.values()).backward()
    for name, parameter in distiller.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert counts != (0, 0) or not parameter.grad.any(), name


def test_weights_are_factors():
    weights = {"main_weight": 2.0, "vlr_weight": 3.0, "cls_weight": 4.0, "feature_weight": 5.0}
    for options, wanted in ((weights, [2, 3, 4, 5]), ({}, [0.25, 0.25, 10, 2])):
        distiller, losses = distil(narrow(), narrow(seed=1), **options)
        assert distiller.methods["ld"].weights == dict(zip(TERMS, wanted, strict=True))
        for term, weight in distiller.methods["ld"].weights.items():
            raw = distiller.raw[f"ld/{term}"].item()
            assert raw > 0 and losses[term].item() == pytest.approx(weight * raw)


@pytest.mark.parametrize("term", ["cls", "vlr", "feature"])
def test_a_term_that_is_off_is_absent_and_changes_no_other(term):
    losses = [distil(narrow(), narrow(seed=1), **given)[1] for given in ({}, {term: False})]
    assert set(losses[1]) == set(TERMS) - {term}
    for other, value in losses[1].items():
        assert value.item() == pytest.approx(losses[0][other].item())


def test_classes_count_where_they_are_compared():
    with pytest.raises(UserError, match="ld: the teacher gfl_r18 has 5 classes"):
        Distiller(narrow(), narrow(num_classes=5), {"ld": LD()})
    _, losses = distil(narrow(), narrow(num_classes=5, seed=1), cls=False)
    assert all(value > 0 for value in losses.values())
    with pytest.raises(UserError, match=r"ld: gfl_r18 has 1 class, .*; set cls to false"):
        Distiller(narrow(num_classes=1), narrow(num_classes=1), {"ld": LD()})
    models = narrow(num_classes=1), narrow(num_classes=1, seed=1)
    _, losses = distil(*models, make_batch((4, 3), num_classes=1), cls=False)
    assert all(value > 0 for value in losses.values())


@pytest.mark.parametrize(
    ("student", "teacher"),
    [("gfl_r18", "atss_r18"), ("retinanet_r18", "gfl_r18"), ("fcos_r18", "fcos_r18")],
)
def test_pairs_without_distributions_are_refused(student, teacher):
    sentence = f"^ld needs distance distributions over the same bins .* {teacher}.*crosskd"
    with pytest.raises(UserError, match=sentence):
        Distiller(narrow(student), narrow(teacher, seed=1), {"ld": LD()})


def test_refusals():
    with pytest.raises(UserError, match=r"not predicted by gfl_r18; choose .* of one reg_max"):
        Distiller(narrow(reg_max=8), narrow(), {"ld": LD()})
    student = narrow()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="ld compares the two detectors anchor by anchor"):
        Distiller(student, narrow(seed=1), {"ld": LD()})
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {"ld": LD()})
    for option in ("temperature", "cls_temperature"):
        with pytest.raises(UserError, match=f"ld: {option} is 0.0; expected a number above 0"):
            LD(**{option: 0.0})
        with pytest.raises(UserError, match=f"method 'ld', option {option}"):
            create_method("ld", **{option: 0.0})
    for gamma in (0.0, 1.0):
        with pytest.raises(UserError, match=f"ld: gamma is {gamma}; expected a number between"):
            LD(gamma=gamma)
        with pytest.raises(UserError, match="method 'ld', option gamma"):
            create_method("ld", gamma=gamma)
