"""The RoI head: who is sampled, where boxes are pooled, what the losses are; by hand."""

import json
import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from detdistill.detectors.roi_head import RoIHead
from detdistill.structures import Batch, Proposals, Pyramid, RoIOutput

TRUTH = [[0.0, 0.0, 40.0, 40.0], [60.0, 60.0, 100.0, 100.0]]


def head(num_classes=3, **options):
    torch.manual_seed(0)
    return RoIHead(num_classes, in_channels=2, channels=8, **options)


def targets(*images):
    """Boxes of each image; their labels count up from 1."""
    return Batch(
        torch.zeros(len(images), 3, 1, 1),
        [(128, 128)] * len(images),
        [
            {"boxes": torch.tensor(b).reshape(-1, 4), "labels": torch.arange(len(b)) + 1}
            for b in images
        ],
    ).padded_targets()


def proposals(*images):
    boxes = [torch.tensor(b).float().reshape(-1, 4) for b in images]
    return Proposals(
        boxes,
        [torch.full((len(b),), 0.5) for b in boxes],
        [torch.arange(4 * len(b)).reshape(-1, 4) for b in boxes],
    )


def pyramid(strides=(4, 8, 16, 32, 64), size=256, batch=1):
    """Every value of level l is l."""
    levels = [torch.full((batch, 2, size // s, size // s), float(i)) for i, s in enumerate(strides)]
    return Pyramid([level.requires_grad_() for level in levels], strides)


def test_samples_ground_truth_then_positives_then_background():
    found = head().sample(
        proposals([[0, 0, 40, 19], [0, 0, 40, 20], [90, 90, 120, 120], [62, 60, 100, 100]]),
        targets(TRUTH),
    )
    [boxes], [scores], [origin], [labels] = (
        found.boxes_xyxy,
        found.scores,
        found.origin,
        found.labels,
    )
    assert boxes.tolist() == [
        *TRUTH,
        [0, 0, 40, 20],  # IoU 0.5 is enough
        [62, 60, 100, 100],
        [0, 0, 40, 19],
        [90, 90, 120, 120],
    ]
    assert labels.tolist() == [1, 2, 1, 2, 3, 3]
    assert scores.tolist() == [1, 1, 0.5, 0.5, 0.5, 0.5]
    assert found.from_truth[0].tolist() == [True, True, False, False, False, False]
    assert origin[:, 0].tolist() == [-1, -1, 4, 12, 0, 8]
    assert origin[:2, 3].tolist() == [0, 1]
    assert found.matched_boxes[0].tolist() == [*TRUTH, *TRUTH, [0] * 4, [0] * 4]


def test_images_without_boxes_or_without_proposals():
    found = head().sample(proposals([[0, 0, 9, 9]], [], []), targets([], TRUTH[:1], []))
    assert [labels.tolist() for labels in found.labels] == [[3], [1], []]
    assert found.image_index.tolist() == [0, 1]


def test_a_ground_truth_box_without_area_is_background():
    [labels] = head().sample(proposals([]), targets([[5.0, 5.0, 5.0, 9.0]])).labels
    assert labels.tolist() == [3]


def test_few_proposals_are_all_taken_whatever_the_seed_and_many_are_drawn():
    low = torch.rand(600, 2) * 60
    many = proposals(torch.cat((low, low + 40), 1).tolist() + [TRUTH[0]] * 200)
    few = Proposals(*([part[0][:300]] for part in (many.boxes_xyxy, many.scores, many.origin)))
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append([head_.sample(p, targets(TRUTH)) for p in (many, few) for head_ in [head()]])
        [labels] = draws[-1][0].labels
        assert (len(labels), (labels < 3).sum()) == (512, 128)
        [labels] = head(samples=40).sample(many, targets(TRUTH)).labels
        assert (len(labels), (labels < 3).sum()) == (40, 10)
    assert len(draws[0][1].labels[0]) == 302
    torch.testing.assert_close(draws[0][1].boxes_xyxy, draws[1][1].boxes_xyxy)


@pytest.mark.parametrize("strides", [(4, 8, 16, 32, 64), (8, 16, 32, 64, 128)])
def test_a_box_is_pooled_from_the_level_of_its_size(strides):
    sides = [448, 10, 224, 111, 112, 223, 447, 2000]
    boxes = [[900, 900, 900 + side, 900 + side] for side in sides]
    maps = pyramid(strides, size=2048, batch=2)
    for level in maps:
        level.data[1] += 10
    pooled = head().pool(maps, proposals(boxes[:3], boxes[3:]))
    assert pooled.shape == (8, 2, 7, 7)
    # The largest box reaches over the border, where the mean is taken with zeros.
    assert pooled.amax((1, 2, 3)).tolist() == [3, 0, 2, 10, 11, 11, 12, 13]


def test_pooling_holds_two_copies_of_its_boxes_at_most(tmp_path):
    corners = [[i % 100, i // 4] for i in range(400)]
    boxes, maps = proposals([[x, y, x + 40, y + 20] for x, y in corners]), pyramid()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        pooled = head().pool(maps, boxes)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    held = [e["args"]["Total Allocated"] for e in events if e.get("name") == "[memory]"]
    assert pooled.nbytes < max(held) - min(held) < 2.5 * pooled.nbytes


def test_features_follow_the_activation_and_gradients_reach_every_pooled_level():
    maps, boxes = pyramid(), proposals([[0, 0, 40, 40]])
    boxes.boxes_xyxy[0].requires_grad_()
    with torch.no_grad():
        for level in maps:
            level.normal_()
    chosen = head()
    found = chosen.roi(maps, boxes)
    assert [f.shape for f in found.features] == [(1, 8), (1, 8)]
    assert all((f >= 0).all() for f in found.features)
    assert (found.logits.shape, found.boxes.shape) == ((1, 4), (1, 12))
    (found.logits.sum() + found.boxes.sum()).backward()
    assert maps[0].grad.any()
    assert all(level.grad is not None for level in maps.levels[:4])
    assert maps[4].grad is None and boxes.boxes_xyxy[0].grad is None


def test_bfloat16_pools_in_float32():
    maps = Pyramid([level.detach().bfloat16() for level in pyramid()], (4, 8, 16, 32, 64))
    with torch.autocast("cpu", torch.bfloat16):
        found = head().roi(maps, proposals([[0, 0, 40, 40]]))
    assert found.logits.dtype == torch.bfloat16
    assert head().pool(maps, proposals([[0, 0, 40, 40]])).dtype == torch.float32


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_losses_by_hand(class_agnostic):
    chosen = head(class_agnostic=class_agnostic)
    sampled = chosen.sample(
        proposals([[0, 0, 40, 36], [100, 100, 120, 120]]), targets([[0.0, 0.0, 40.0, 40.0]])
    )
    deltas = torch.zeros(3, 4 if class_agnostic else 12)
    deltas[:, 0 if class_agnostic else 4] = 0.25  # dx of class 1
    deltas[2] = 9.0  # background learns no box
    losses = chosen.loss(RoIOutput([], torch.zeros(3, 4), deltas), sampled)
    assert losses["cls"].item() == pytest.approx(math.log(4))
    # The ground truth is off by 0.25; the other by 0.25, dy 2/36 of 0.1 and log(40/36) of 0.2.
    wanted = 0.25 + 0.25 + 2 / 36 / 0.1 + math.log(40 / 36) / 0.2
    assert losses["box"].item() == pytest.approx(wanted / 3, rel=1e-5)


def test_nothing_to_learn_costs_nothing():
    chosen, maps = head(), pyramid()
    sampled = chosen.sample(proposals([]), targets([]))
    losses = chosen.loss(chosen.roi(maps, sampled), sampled)
    assert {name: loss.item() for name, loss in losses.items()} == {"cls": 0.0, "box": 0.0}
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in chosen.parameters())


def test_detections_by_hand():
    boxes = proposals([[0, 0, 40, 40], [2, 0, 40, 40], [60, 60, 100, 100]], [])
    probabilities = torch.tensor(
        [[0.6, 0.3, 0.06, 0.04], [0.5, 0.4, 0.04, 0.06], [0.01, 0.01, 0.01, 0.97]]
    )
    deltas = torch.zeros(3, 12)
    deltas[1, 4] = 10.0  # class 1 of the second box moves by 38 pixels: no overlap any more
    output = RoIOutput([], probabilities.log(), deltas)
    found, nothing = head().detect(output, boxes, [(64, 64), (64, 64)])
    assert len(nothing) == 0
    assert found.labels.tolist() == [0, 1, 1, 2]
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.4, 0.3, 0.06]))
    assert found.boxes_xyxy.tolist() == [
        [0, 0, 40, 40],
        [40, 0, 64, 40],
        [0, 0, 40, 40],
        [0, 0, 40, 40],
    ]
    assert len(head().detect(output, boxes, [(64, 64)] * 2, max_detections=1)[0]) == 1
    assert len(head().detect(output, boxes, [(64, 64)] * 2, score_threshold=0.35)[0]) == 2


def test_refining_moves_clips_and_drops_the_ground_truth():
    chosen = head(class_agnostic=True)
    given = proposals([[20, 20, 40, 40], [90, 90, 120, 120]], [[0, 0, 10, 10]])
    sampled = chosen.sample(given, targets(TRUTH[:1], []))
    deltas = torch.zeros(4, 4)
    deltas[:, 0] = 10.0  # a whole width to the right
    moved = chosen.refine(RoIOutput([], torch.zeros(4, 4), deltas), sampled, [(100, 100)] * 2)
    assert [boxes.tolist() for boxes in moved.boxes_xyxy] == [
        [[40, 20, 60, 40], [100, 90, 100, 100]],
        [[10, 0, 20, 10]],
    ]
    assert [len(scores) for scores in moved.scores] == [2, 1]
    assert torch.equal(moved.origin[0], given.origin[0])
    assert moved.labels is None
