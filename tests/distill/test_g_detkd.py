"""G-DetKD: its terms against plain loops, what is remembered, whom it reaches, what is refused."""

import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, roi_align

from detdistill import Batch, Distiller, GDetKD, UserError, create_method
from detdistill.boxes import pairwise_iou
from detdistill.detectors.roi_head import sample_proposals
from detdistill.distill.contrast import Contrast, VectorMemory
from detdistill.distill.g_detkd import LevelFusion
from detdistill.structures import Proposals, Pyramid
from tests.helpers import make_batch, narrow

BOTH = {"sgfi": 1.0, "contrast": 0.5}
ALONE = {"sgfi": 1.0}
PAIRS = [
    ("retinanet_r18", "faster_rcnn_r18", BOTH),
    ("fcos_r18", "faster_rcnn_r18", BOTH),
    ("reppoints_r18", "cascade_rcnn_r18", BOTH),
    ("fcos_r18", "reppoints_r18", ALONE),
    ("faster_rcnn_r18", "cascade_rcnn_r18", BOTH),
    ("faster_rcnn_r18", "retinanet_r18", ALONE),
]
TERMS = ("sgfi", "contrast")


def distil(student="retinanet_r18", teacher="faster_rcnn_r18", counts=(2, 1), **options):
    """A distiller after one step on a batch, and that step's terms."""
    models = narrow(student), narrow(teacher, seed=1, fpn_channels=24)
    distiller = Distiller(*models, {"g_detkd": GDetKD(**options)}).train()
    return distiller, distiller(make_batch(counts))


def reached(module):
    return any(p.grad is not None and p.grad.any() for p in module.parameters())


def some_proposals(*images):
    """Of boxes of each image."""
    boxes = [torch.tensor(rows, dtype=torch.float32).reshape(-1, 4) for rows in images]
    origin = [torch.zeros(len(b), 4, dtype=torch.int64) for b in boxes]
    return Proposals(boxes, [torch.ones(len(b)) for b in boxes], origin)


ROIS = some_proposals([[0, 0, 32, 24], [3, 5, 17, 30], [20, 1, 32, 9]], [[8, 8, 9, 31]])


def fusion_step(seed=0):
    """A fusion of two levels of 3 channels towards 8, and what it is given."""
    torch.manual_seed(seed)
    fusion = LevelFusion(3, 8)
    torch.nn.init.normal_(fusion.adapter.bias)
    torch.nn.init.constant_(fusion.tau, 0.7)
    for conv in fusion.embed[::2]:  # small, or one level would take all
        torch.nn.init.uniform_(conv.weight, -0.1, 0.2)
        torch.nn.init.uniform_(conv.bias, -0.1, 0.1)
    pyramid = Pyramid([torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)], (4, 8))
    return fusion, pyramid, torch.randn(4, 8, 7, 7).relu()


def embedded(fusion, maps):
    first, _, second, _ = fusion.embed
    maps = F.conv2d(maps, first.weight, first.bias, stride=2).clamp(min=0)
    return F.conv2d(maps, second.weight, second.bias, stride=2).clamp(min=0).flatten()


def test_sgfi_is_what_a_plain_loop_finds():
    """Box by box and level by level; the adapter after RoIAlign, as published."""
    fusion, pyramid, pooled = fusion_step()
    rows = [(i, box) for i, boxes in enumerate(ROIS.boxes_xyxy) for box in boxes]
    expected = []
    for wanted, (image, box) in zip(pooled, rows, strict=True):
        levels, alike = [], []
        for level, stride in zip(pyramid, pyramid.strides, strict=True):
            own = [box[None]]
            found = roi_align(level[image, None], own, 7, 1 / stride, 0, aligned=True)
            levels.append(F.conv2d(found, fusion.adapter.weight, fusion.adapter.bias))
            alike.append(embedded(fusion, levels[-1]) @ embedded(fusion, wanted[None]))
        weights = np.exp([value.item() / 0.7 for value in alike])
        weights /= weights.sum()
        assert 0.02 < weights[0] < 0.98, "one level takes all"
        expected.append(sum(w * level for w, level in zip(weights, levels, strict=True)))
    found = fusion(pyramid, ROIS, pooled)
    torch.testing.assert_close(found, torch.cat(expected).float(), rtol=1e-4, atol=1e-5)


def test_the_levels_of_a_box_share_its_weight_whatever_the_other_boxes():
    fusion, _, pooled = fusion_step()
    levels = [torch.randn(4, 8, 7, 7) for _ in range(3)]
    weights = fusion.level_weights(levels, pooled)
    assert weights.shape == (4, 3)
    torch.testing.assert_close(weights.sum(1), torch.ones(4))
    alone = fusion.level_weights([level[1:2] for level in levels], pooled[1:2])
    torch.testing.assert_close(alone, weights[1:2])


def contrast_of(width=5, memory=10, positive=False):
    return Contrast(torch.nn.Identity(), VectorMemory(memory, width), 0.07, positive=positive)


def by_hand(found, steps, boxes, positive):
    """The mean over the boxes; `steps` are the teacher's normalised vectors, the newest first."""
    found = found.numpy().astype(np.float64)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    image = np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])
    iou = box_iou(torch.cat(boxes), torch.cat(boxes)).numpy()
    losses = []
    for j, own in enumerate(found):
        below = 0.0
        for age, vectors in enumerate(steps):
            for i, vector in enumerate(vectors):
                same = age == 0 and image[i] == image[j] and iou[i, j] > 0.5
                if not same or (positive and i == j):
                    below += np.exp(vector @ own / 0.07)
        losses.append(-np.log(np.exp(steps[0][j] @ own / 0.07) / below))
    return np.mean(losses)


@pytest.mark.parametrize("positive", [False, True])
def test_contrast_by_hand_over_three_steps_with_a_memory_of_two(positive):
    contrast = contrast_of(memory=2, positive=positive)
    generator, known = torch.Generator().manual_seed(0), deque(maxlen=2)
    for count in (3, 5, 4):
        low = torch.rand(2, count, 2, generator=generator) * 8  # many overlap by more than half
        boxes = list(torch.cat((low, low + 12), 2))
        for own in boxes:
            assert count < (pairwise_iou(own, own) > 0.5).sum() <= count**2
        found, wanted = torch.randn(2, 2 * count, 5, generator=generator)
        vectors = wanted.numpy().astype(np.float64)
        known.appendleft(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        loss = contrast.loss(found, wanted, boxes)
        assert loss.item() == pytest.approx(by_hand(found, known, boxes, positive), rel=1e-4)


def test_with_the_positive_it_is_the_textbooks_infonce():
    torch.manual_seed(0)
    found, wanted = torch.randn(2, 6, 5)
    apart = torch.arange(6.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    loss = contrast_of(positive=True).loss(found, wanted, [apart[:4], apart[4:]])
    cosines = F.normalize(found, dim=1) @ F.normalize(wanted, dim=1).T
    torch.testing.assert_close(loss, F.cross_entropy(cosines / 0.07, torch.arange(6)))
    without = contrast_of().loss(found, wanted, [apart[:4], apart[4:]])
    assert without < loss


@pytest.mark.parametrize("positive", [False, True])
def test_what_there_is_nothing_to_contrast_with_gives_0_and_a_gradient(positive):
    same = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11]])  # one box, or two of one object
    for boxes in (same[:1], same, same[:0]):
        found = torch.randn(len(boxes), 5, requires_grad=True)
        loss = contrast_of(positive=positive).loss(found, torch.randn(len(boxes), 5), [boxes])
        loss.backward()
        assert loss.item() == 0
        assert found.grad is not None and not found.grad.any()


def test_boxes_without_a_size_and_vectors_of_zeros_stay_finite():
    boxes = torch.tensor([[3.0, 3, 3, 3], [3, 3, 3, 3], [0, 0, 9, 9]])
    found = torch.zeros(3, 5, requires_grad=True)
    loss = contrast_of().loss(found, torch.zeros(3, 5), [boxes])
    loss.backward()
    assert loss.isfinite() and found.grad.isfinite().all()


def test_the_memory_keeps_its_last_steps_and_comes_back_from_a_checkpoint():
    memory = VectorMemory(3, 2)
    given = [torch.rand(count, 2) for count in (2, 1, 0, 4)]
    for vectors in given:
        steps, first = memory(vectors)
        assert first == 0 and torch.equal(steps[0], vectors)
    assert [len(vectors) for vectors in steps] == [4, 0, 1]
    restored = VectorMemory(3, 2)
    restored.load_state_dict(memory.state_dict())
    for one, two in zip(memory.steps, restored.steps, strict=True):
        assert torch.equal(one, two)
    memory.eval()
    seen, _ = memory(torch.ones(1, 2))
    assert [len(vectors) for vectors in seen] == [1, 4, 0]
    assert [len(vectors) for vectors in memory.steps] == [4, 0, 1]
    empty = VectorMemory(3, 2)
    empty.load_state_dict(VectorMemory(3, 2).state_dict())
    assert not empty.steps


PROCESSES = """
import sys
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes
from detdistill.distill.contrast import Contrast, VectorMemory

def work(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    apart = torch.arange(5.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    contrast = Contrast(torch.nn.Identity(), VectorMemory(2, 3), 0.07, positive=True)
    for step, counts in enumerate(((2, 3), (1, 0), (3, 2))):
        torch.manual_seed(step)
        found, wanted = torch.randn(2, sum(counts), 3)
        own = slice(0, counts[0]) if rank == 0 else slice(counts[0], None)
        loss = contrast.loss(found[own], wanted[own], [apart[own]])
        steps = contrast.memory.steps
        assert torch.allclose(steps[0], torch.nn.functional.normalize(wanted, dim=1))
        if counts[rank]:
            found = torch.nn.functional.normalize(found[own], dim=1)
            places = torch.arange(sum(counts))[own]
            expected = torch.nn.functional.cross_entropy(
                found @ torch.cat(list(steps)).T / 0.07, places
            )
            assert torch.allclose(loss, expected)
        else:
            assert loss == 0
    assert [len(vectors) for vectors in steps] == [5, 1]
    dist.destroy_process_group()

if __name__ == "__main__":
    start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")  # imports once
"""


def test_processes_share_their_vectors_in_one_order(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "meeting")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(("student", "teacher", "weights"), PAIRS)
def test_terms_of_each_pair(student, teacher, weights):
    distiller, losses = distil(student, teacher)
    assert distiller.methods["g_detkd"].weights == weights
    assert {name for name in losses if name.startswith("g_detkd/")} == {
        f"g_detkd/{term}" for term in weights
    }
    for term, weight in weights.items():
        raw = distiller.raw[f"g_detkd/{term}"].item()
        assert losses[f"g_detkd/{term}"].item() == pytest.approx(raw * weight)


def test_options_leave_a_term_out_or_weigh_it():
    _, losses = distil(contrast=False, sgfi_weight=2.0)
    assert "g_detkd/contrast" not in losses
    distiller, losses = distil(sgfi=False, projector="single")
    assert "g_detkd/sgfi" not in losses
    assert distiller.methods["g_detkd"].contrast.projector.linear.weight.shape == (32, 16)
    distiller, _ = distil(sgfi=False)
    assert distiller.methods["g_detkd"].contrast.projector.linear.weight.shape == (9 * 32, 16)


@pytest.mark.parametrize("student", ["retinanet_r18", "faster_rcnn_r18"])
def test_whom_each_term_reaches(student):
    for term, other in zip(TERMS, TERMS[::-1], strict=True):
        teacher = "cascade_rcnn_r18" if student.startswith("faster") else "faster_rcnn_r18"
        distiller, losses = distil(student, teacher)
        losses[f"g_detkd/{term}"].backward()
        model, method = distiller.student, distiller.methods["g_detkd"]
        parts = {"sgfi": method.fusion, "contrast": method.contrast}
        assert all(p.grad is not None and p.grad.any() for p in parts[term].parameters())
        assert not reached(parts[other]) and not reached(distiller.teacher)
        assert reached(model.backbone) and reached(model.fpn)
        heads = model.roi_heads if student.startswith("faster") else model.towers["cls"]
        assert reached(heads) == (term == "contrast")
        others = model.rpn if student.startswith("faster") else model.towers["box"]
        assert not reached(others)


def test_the_student_leaves_as_it_came():
    keys = set(narrow("retinanet_r18").state_dict())
    distiller, _ = distil()
    assert set(distiller.student.state_dict()) == keys
    own = {k for k in distiller.state_dict() if not k.startswith(("student.", "_extra_state"))}
    assert {key.split(".")[2] for key in own} == {"fusion", "contrast"}
    assert "methods.g_detkd.contrast.memory._extra_state" in own


def test_dense_students_draw_boxes_without_the_ground_truth(monkeypatch):
    drawn = []

    def watched(*args, **kwargs):
        drawn.append(sample_proposals(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr("detdistill.distill.g_detkd.sample_proposals", watched)
    distil(samples=8, proposals=50)
    [rois] = drawn
    assert [len(boxes) for boxes in rois.boxes_xyxy] == [8, 8]
    assert not torch.cat(rois.from_truth).any()


@pytest.mark.parametrize(("student", "teacher", "_"), PAIRS)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0)])
def test_finite_without_objects(student, teacher, _, counts):
    distiller, losses = distil(student, teacher, counts)
    sum(losses.values()).backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in distiller.parameters())


def test_without_proposals_its_terms_are_0_with_gradients(monkeypatch):
    student = narrow("retinanet_r18")
    nothing = some_proposals([], [])
    monkeypatch.setattr(student, "propose", lambda *_, **__: nothing)
    distiller = Distiller(student, narrow("faster_rcnn_r18", seed=1), {"g_detkd": GDetKD()})
    losses = distiller(make_batch())
    assert losses["g_detkd/sgfi"] == 0 and losses["g_detkd/contrast"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in distiller.parameters())


def test_a_restored_distiller_goes_on_with_the_same_bits():
    batches = [make_batch(seed=seed) for seed in range(3)]
    whole, _ = distil(memory=2)
    state = {key: value.clone() for key, value in whole.state_dict().items()}
    torch.manual_seed(0)
    expected = whole(batches[1])
    restored = Distiller(
        narrow("retinanet_r18", seed=3),
        narrow("faster_rcnn_r18", seed=1, fpn_channels=24),
        {"g_detkd": GDetKD(memory=2)},
    )
    restored.load_state_dict(state)
    torch.manual_seed(0)
    for name, value in restored(batches[1]).items():
        assert torch.equal(value, expected[name]), name
    forgetful, _ = distil(memory=1)
    torch.manual_seed(0)
    assert forgetful(batches[1])["g_detkd/contrast"] != expected["g_detkd/contrast"]


@pytest.mark.parametrize(
    ("student", "teacher", "options", "words"),
    [
        ("gfl_r18", "gfl_r18", {"contrast": True}, "dense teacher gfl_r18 has none; leave"),
        ("gfl_r18", "gfl_r18", {"sgfi": False}, "since gfl_r18 has no RoI heads"),
        (
            "gfl_r18",
            "faster_rcnn_r18",
            {"sgfi": False, "contrast": False},
            "as asked for; set sgfi to true",
        ),
        (
            *("faster_rcnn_r18", "cascade_rcnn_r18", {"projector": "per_anchor"}),
            "g_detkd: projector 'per_anchor' needs .* use 'single'",
        ),
    ],
)
def test_pairs_that_do_not_fit_are_refused(student, teacher, options, words):
    with pytest.raises(UserError, match=words) as caught:
        distil(student, teacher, **options)
    assert "\n" not in str(caught.value)


def test_options_out_of_range_are_refused():
    for options in ({"temperature": 0}, {"memory": 0}, {"samples": 3}, {"projector": "both"}):
        with pytest.raises(UserError, match=next(iter(options))):
            create_method("g_detkd", **options)


def test_other_classes_may_teach_and_half_precision_may_learn():
    teacher = narrow("faster_rcnn_r18", 7, seed=1)
    distiller = Distiller(narrow("retinanet_r18"), teacher, {"g_detkd": GDetKD()})
    batch = make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        losses = distiller(Batch(batch.images, batch.sizes, batch.targets))
    own = [losses[f"g_detkd/{term}"] for term in TERMS]
    assert all(value.dtype == torch.float32 and value.isfinite() for value in own)
