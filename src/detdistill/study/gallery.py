"""Test pictures on which student and distilled student differ most, side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detdistill.data import DetectionDataset
from detdistill.drawing.page import Panel
from detdistill.drawing.pictures import Layer, draw_layers, jpeg_data_uri
from detdistill.evaluation.coco import Matches, match_at_50
from detdistill.study.runs import TEST_DETECTIONS, RunScore, read_json
from detdistill.study.summary import Arm, arm_of, control_of

# Told apart by people who are colour-blind, too: bluish green, orange, yellow and dashed.
CORRECT, FALSE, MISSED, TRUTH = "#00c78b", "#ff6a1f", "#ffe11f", "#5db2ff"


@dataclass(frozen=True)
class Outcome:
    """What one detector did on one image, at the score at which it works best.

    Attributes:
        correct, false: boxes (N, 4) xyxy, pixels.
        missed: ground-truth boxes (N, 4) xyxy, pixels.
    """

    correct: Tensor
    false: Tensor
    missed: Tensor

    @property
    def points(self) -> int:
        """Objects found less false alarms."""
        return len(self.correct) - len(self.false)


def make_gallery(
    arms: Sequence[Arm], method: Arm, dataset: DetectionDataset, gains: int = 5, losses: int = 3
) -> dict[str, list[list[Panel]]]:
    """Rows of panels: ground truth, teacher (where there is one), student, distilled student.

    The first seed is shown. "gains" are pictures on which distillation helps most, "losses" those
    on which it hurts most.
    """
    distilled = method.runs[0]
    teacher, controls = arm_of(arms, "teacher"), control_of(arms).runs
    runs = {
        **({} if teacher is None else {"teacher": teacher.runs[0]}),
        "student": next(run for run in controls if run.seed == distilled.seed),
        method.title: distilled,
    }
    truth = dataset.ground_truth()
    shown = {name: outcomes(truth, _detections(run)) for name, run in runs.items()}
    before, after = shown["student"], shown[method.title]
    chosen = {
        "gains": choose_images(before, after, gains),
        "losses": choose_images(after, before, losses),
    }
    places = {record.image_id: index for index, record in enumerate(dataset.records)}
    return {
        group: [_row(dataset, places[i], {n: o[i] for n, o in shown.items()}) for i in image_ids]
        for group, image_ids in chosen.items()
    }


def choose_images(before: dict[int, Outcome], after: dict[int, Outcome], count: int) -> list[int]:
    """Images with the largest rise in points; ties go to the lower image id.

    Images without a rise are never chosen.
    """
    rise = {i: after[i].points - before[i].points for i in before}
    ranked = sorted((i for i in rise if rise[i] > 0), key=lambda i: (-rise[i], i))
    return ranked[:count]


def outcomes(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[int, Outcome]:
    """What a detector did on each image, at the score at which its F1 on all of them is best."""
    matches = match_at_50(truth, results)
    limit = best_score(results, matches)
    ids = [image["id"] for image in truth["images"]]
    correct: dict[int, list[Any]] = {i: [] for i in ids}
    false: dict[int, list[Any]] = {i: [] for i in ids}
    missed: dict[int, list[Any]] = {i: [] for i in ids}
    for result, is_correct in zip(results, matches.correct, strict=True):
        if is_correct is not None and result["score"] >= limit:
            (correct if is_correct else false)[result["image_id"]].append(result["bbox"])
    for annotation, finder in zip(truth["annotations"], matches.found_by, strict=True):
        found = finder is not None and results[finder]["score"] >= limit
        if not found and not annotation["iscrowd"]:
            missed[annotation["image_id"]].append(annotation["bbox"])
    return {
        i: Outcome(xywh_to_xyxy(correct[i]), xywh_to_xyxy(false[i]), xywh_to_xyxy(missed[i]))
        for i in ids
    }


def best_score(results: Sequence[dict[str, Any]], matches: Matches) -> float:
    """The lowest score to keep so that F1 at IoU 0.5 is best; detectors differ in their scale."""
    judged = [
        (result["score"], is_correct)
        for result, is_correct in zip(results, matches.correct, strict=True)
        if is_correct is not None
    ]
    if not any(is_correct for _, is_correct in judged):
        return 1.0
    judged.sort(key=lambda pair: -pair[0])
    hits = np.cumsum([is_correct for _, is_correct in judged])
    kept = np.arange(1, len(judged) + 1)
    f1 = 2 * hits / (kept + len(matches.found_by))
    return float(judged[int(f1.argmax())][0])


def xywh_to_xyxy(boxes: list[list[float]]) -> Tensor:
    """COCO boxes to (N, 4) corners."""
    boxes_xywh = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torch.cat([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], 1)


def _detections(run: RunScore) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = read_json(run.folder / TEST_DETECTIONS)
    return results


def _row(dataset: DetectionDataset, index: int, shown: dict[str, Outcome]) -> list[Panel]:
    record, image = dataset.records[index], dataset.read(index)
    counts = Counter(dataset.classes[label] for label in record.labels[~record.crowd].tolist())
    objects = ", ".join(f"{count} {name}" for name, count in counts.items()) or "no object"
    truth = draw_layers(image, [Layer(record.boxes_xyxy[~record.crowd], TRUTH)])
    panels = [Panel("ground truth", objects, jpeg_data_uri(truth))]
    for name, outcome in shown.items():
        layers = [
            Layer(outcome.missed, MISSED, dashed=True),
            Layer(outcome.false, FALSE),
            Layer(outcome.correct, CORRECT),
        ]
        total = len(outcome.correct) + len(outcome.missed)
        caption = f"{len(outcome.correct)} of {total} found, {len(outcome.false)} false"
        panels.append(Panel(name, caption, jpeg_data_uri(draw_layers(image, layers))))
    return panels
