"""RM: tables worked by hand, whom it reaches, what does not matter to it, what is refused."""

import copy
from math import log

import pytest
import torch

from detdistill import RM, Distiller, UserError, create_method
from detdistill.distill.rank_mimicking import rank_divergence
from detdistill.structures import IGNORE
from tests.distill import handmade
from tests.helpers import make_batch, narrow

R18 = ["atss_r18", "fcos_r18", "gfl_r18", "retinanet_r18"]

# Two images of 1 x 4 cells, one anchor each, two classes; which object each cell is a candidate of.
LABELS = [[0, 1], [1, 0]]
MATCHED = [[0, 0, 1, -1], [0, 0, 1, 1]]
# Logits of the object's own class. By hand, the shares among an object's candidates:
#   object 0 of image 0: teacher 1/2 1/2, student 1/4 3/4: KL = 1/2 ln 2 + 1/2 ln 2/3 = 0.143841
#   object 1 of image 0: one candidate, nothing to rank
#   object 0 of image 1: teacher 3/4 1/4, student 1/2 1/2: KL = 3/4 ln 3/2 + 1/4 ln 1/2 = 0.130812
#   object 1 of image 1: teacher 3/4 1/4, student 1/4 3/4: KL = 1/2 ln 3 = 0.549306
TEACHER = [[0.0, 0.0, 5.0, 9.0], [log(3), 0.0, log(3), 0.0]]
STUDENT = [[0.0, log(3), -5.0, 1.0], [2.0, 2.0, 0.0, log(3)]]
BY_HAND = [[0.143841, 0.0], [0.130812, 0.549306]]


def maps(rows, other=7.0, anchors=1):
    """Rows (B, 4) as logits (B, A, 2, 1, 4/A) of the class wanted at each cell, else `other`."""
    logits = torch.full((2, 4, 2), float(other))
    for image, row in enumerate(rows):
        for cell, value in enumerate(row):
            label = LABELS[image][max(MATCHED[image][cell], 0)]
            logits[image, cell, label] = value
    return logits.reshape(2, 1, 4 // anchors, anchors, 2).permute(0, 3, 4, 1, 2).requires_grad_()


def rank(student, teacher, matched=MATCHED, labels=LABELS, **options):
    step = handmade.step(
        handmade.output([student]),
        handmade.output([teacher]),
        labels,
        of_teacher=handmade.assignment(matched, labels),
    )
    return RM(**options)(step)["rank"]


@pytest.mark.parametrize("anchors", [1, 2])
def test_the_mean_over_objects_with_candidates_to_rank(anchors):
    found = rank(maps(STUDENT, 7, anchors), maps(TEACHER, -3, anchors), score="logit")
    assert found.item() == pytest.approx((0.143841 + 0.130812 + 0.549306) / 3, abs=1e-5)


def test_the_mean_over_images_of_their_objects():
    found = rank(maps(STUDENT), maps(TEACHER), score="logit", normalizer="image")
    wanted = (0.143841 + (0.130812 + 0.549306) / 2) / 2
    assert found.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("normalizer", "wanted"),
    [
        # Three of five objects have ranks; the padded slot of image 0 is no object.
        ("batch", (0.143841 + 0.130812 + 0.549306) / 5),
        # Image 0: one of two objects; image 1: two of three, the third has no candidate.
        ("image", (0.143841 / 2 + (0.130812 + 0.549306) / 3) / 2),
    ],
)
def test_all_objects_may_count(normalizer, wanted):
    labels = [[*LABELS[0], IGNORE], [*LABELS[1], 0]]
    options = {"score": "logit", "normalizer": normalizer, "count": "all"}
    found = rank(maps(STUDENT), maps(TEACHER), labels=labels, **options)
    assert found.item() == pytest.approx(wanted, abs=1e-5)


def test_an_image_without_ranks_counts_as_nothing():
    matched = [MATCHED[0], [-1, 0, -1, -1]]
    found = rank(maps(STUDENT), maps(TEACHER), matched, score="logit", normalizer="image")
    assert found.item() == pytest.approx(0.143841 / 2, abs=1e-5)
    found = rank(maps(STUDENT), maps(TEACHER), matched, score="logit")
    assert found.item() == pytest.approx(0.143841, abs=1e-5)


def test_scores_after_the_sigmoid_by_default():
    # Scores 0.8 and 0.2 against 0.5 and 0.5: shares 0.645656 and 0.354344 against a half each;
    # 0.645656 ln 1.291313 + 0.354344 ln 0.708687 = 0.043052.
    teacher = torch.tensor([0.8, 0.2]).logit().reshape(1, 1, 1, 1, 2)
    found = rank(torch.zeros(1, 1, 1, 1, 2), teacher, [[0, 0]], [[0]])
    assert found.item() == pytest.approx(0.043052, abs=1e-6)


def test_sorted_scores_forget_the_anchors():
    found = rank(maps(STUDENT), maps(TEACHER), score="logit", align="sorted")
    # The last object's shares are the same three quarters and a quarter, the other way round.
    assert found.item() == pytest.approx((0.143841 + 0.130812) / 3, abs=1e-5)


def test_the_temperature_divides_the_scores_and_its_square_multiplies():
    twice = [[2 * value for value in row] for row in STUDENT]
    teacher = [[2 * value for value in row] for row in TEACHER]
    found = rank(maps(twice), maps(teacher), score="logit", temperature=2.0)
    assert found.item() == pytest.approx(4 * (0.143841 + 0.130812 + 0.549306) / 3, abs=1e-5)


def test_the_divergence_of_each_object():
    tables = [
        torch.tensor([[rows[0][0], rows[0][1]], [rows[1][0], rows[1][1]], [rows[1][2], rows[1][3]]])
        for rows in (STUDENT, TEACHER)
    ]
    found = rank_divergence(*tables, sort=False)
    wanted = torch.tensor([BY_HAND[0][0], *BY_HAND[1]])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("align", ["anchor", "sorted"])
def test_a_constant_on_an_objects_logits_changes_nothing(align):
    shifted = [list(row) for row in STUDENT]
    for cell in (2, 3):
        shifted[1][cell] += 6.0
    found = [
        rank(maps(rows), maps(TEACHER), score="logit", align=align) for rows in (STUDENT, shifted)
    ]
    torch.testing.assert_close(*found)


def test_other_classes_and_background_do_not_count():
    found = [rank(maps(STUDENT, other), maps(TEACHER, -other)) for other in (7.0, -2.0)]
    torch.testing.assert_close(*found)
    student = maps(STUDENT)
    rank(student, maps(TEACHER)).backward()
    gradient = student.grad.permute(0, 3, 4, 1, 2).reshape(2, 4, 2)
    for image, cells in enumerate(MATCHED):
        for cell, slot in enumerate(cells):
            own = LABELS[image][slot] if (image, slot) not in ((0, 1), (0, -1)) else None
            assert gradient[image, cell].ne(0).tolist() == [own == 0, own == 1]


@pytest.mark.parametrize("align", ["anchor", "sorted"])
def test_no_candidates_are_exactly_zero_with_a_gradient(align):
    for matched in ([[-1] * 4] * 2, [[0, -1, -1, -1], [-1] * 4]):
        student = maps(STUDENT)
        found = rank(student, maps(TEACHER), matched, align=align)
        found.backward()
        assert found.item() == 0 and not student.grad.any()


def test_whose_assignment_says_the_candidates():
    both = {
        "of_teacher": handmade.assignment([[0, 0, -1, -1]], [[0]]),
        "of_student": handmade.assignment([[-1, -1, 0, 0]], [[0]]),
    }
    student = torch.tensor([0.0, log(3), 0.0, 0.0]).reshape(1, 1, 1, 1, 4)
    teacher = torch.tensor([0.0, 0.0, log(3), 0.0]).reshape(1, 1, 1, 1, 4)
    step = handmade.step(handmade.output([student]), handmade.output([teacher]), **both)
    found = [RM(score="logit", candidates=side)(step)["rank"] for side in ("teacher", "student")]
    assert torch.stack(found).tolist() == pytest.approx([0.143841, 0.130812], abs=1e-5)


def distil(student, teacher, batch=None, **options):
    handmade.spread_predictions(student, teacher)
    distiller = Distiller(student, teacher, {"rm": RM(**options)}).train()
    return distiller, distiller(batch or make_batch((4, 3)))["rm/rank"]


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("options", [{}, {"score": "logit", "align": "sorted"}])
def test_reaches_the_classification_and_all_before_it(name, options):
    student, teacher = narrow(name), narrow(name, seed=1)
    distiller, loss = distil(student, teacher, **options)
    assert loss > 0
    assert loss.item() == pytest.approx(4 * distiller.raw["rm/rank"].item())
    loss.backward()
    for part in (student.backbone, student.fpn, student.towers["cls"], student.logits):
        assert any(p.grad is not None and p.grad.any() for p in part.parameters())
    assert all(p.grad is None for p in student.towers["box"].parameters())
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("name", R18)
def test_a_student_equal_to_its_teacher_has_nothing_to_learn(name):
    student = narrow(name).eval()
    distiller = Distiller(student, copy.deepcopy(student), {"rm": RM()}).eval()
    assert distiller(make_batch())["rm/rank"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", R18)
@pytest.mark.parametrize("normalizer", ["batch", "image"])
@pytest.mark.parametrize("count", ["ranked", "all"])
def test_a_batch_without_boxes_is_exactly_zero(name, normalizer, count):
    student, options = narrow(name, 1), {"normalizer": normalizer, "count": count}
    _, loss = distil(student, narrow(name, 1, seed=1), make_batch((0, 0)), **options)
    loss.backward()
    assert loss.item() == 0
    for part in (student.fpn, student.towers["cls"], student.logits):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


@pytest.mark.parametrize("counts", [(3, 2), (3, 0)])
def test_one_class_has_ranks_too(counts):
    _, loss = distil(
        narrow(num_classes=1), narrow(num_classes=1, seed=1), make_batch(counts, num_classes=1)
    )
    assert loss > 0


def test_equal_anchors_of_unlike_families_meet_at_the_teachers_assignment():
    _, loss = distil(narrow("gfl_r18"), narrow("atss_r18", seed=1))
    assert loss > 0
    radius = narrow("fcos_r18", seed=1, center_sampling=True)
    _, loss = distil(narrow("fcos_r18"), radius)
    _, other = distil(narrow("fcos_r18"), radius, candidates="student")
    assert loss > 0 and other > 0 and loss != other


@pytest.mark.parametrize(
    ("student", "teacher"), [("gfl_r18", "retinanet_r18"), ("fcos_r18", "atss_r18")]
)
def test_other_anchors_are_refused(student, teacher):
    with pytest.raises(UserError, match=f"rm compares .* the teacher {teacher} are not those of"):
        Distiller(narrow(student), narrow(teacher, seed=1), {"rm": RM()})


def test_refusals():
    with pytest.raises(UserError, match="rm: the teacher gfl_r18 has 5 classes"):
        Distiller(narrow(), narrow(num_classes=5), {"rm": RM()})
    with pytest.raises(UserError, match="needs a teacher"):
        Distiller(narrow(), None, {"rm": RM()})
    for option in ("score", "align", "candidates", "normalizer", "count"):
        with pytest.raises(UserError, match=f"rm: {option} is 'none'; expected '"):
            RM(**{option: "none"})
        with pytest.raises(UserError, match=f"method 'rm', option {option}"):
            create_method("rm", **{option: "none"})
    with pytest.raises(UserError, match="option temperature"):
        create_method("rm", temperature=0.0)
    student = narrow()
    student.strides = (4, 8, 16, 32, 64)
    with pytest.raises(UserError, match="rm compares"):
        Distiller(student, narrow(seed=1), {"rm": RM()})


@pytest.mark.parametrize("name", ["fcos_r18", "retinanet_r18"])
def test_equals_a_loop_over_the_objects(name):
    student, teacher, batch = narrow(name), narrow(name, seed=1), make_batch((4, 3))
    distiller, _ = distil(student, teacher, batch)
    targets, rows = batch.padded_targets(), []
    with torch.no_grad():
        found = distiller(batch)["rm/rank"] / 4
        output = student(batch)
        assignment = student.assign(output, targets)
        scores = [side.predictions.flatten().logits.sigmoid() for side in (output, teacher(batch))]
    for image, labels in enumerate(targets.labels):
        for slot, label in enumerate(labels):
            mine = assignment.matched[image] == slot
            if mine.sum() > 1:
                logs = [side[image, mine, label].log_softmax(0) for side in scores]
                rows.append(torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True))
    assert len(rows) > 2
    torch.testing.assert_close(found, torch.stack(rows).mean(), rtol=1e-4, atol=1e-6)
