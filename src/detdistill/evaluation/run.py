"""Running a detector over a data set and scoring what it finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch

from detdistill.data import DetectionDataset, ImageRecord, make_eval_batches, open_dataset
from detdistill.data.splits import Split
from detdistill.data.transforms import out_of_reach
from detdistill.detectors import FPNDetector
from detdistill.detectors.inference import eval_mode
from detdistill.errors import UserError
from detdistill.evaluation.coco import CocoMetrics, Result, coco_metrics
from detdistill.recipe import Recipe, validate_recipe
from detdistill.structures import Detections

Device = torch.device | str


def detect_dataset(
    detector: FPNDetector,
    dataset: DetectionDataset,
    recipe: Recipe,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Detections on every image of a data set as COCO results.

    Args:
        detector: any detector; it is moved to `device` and left in its mode.
        dataset: an opened split.
        recipe: its resize and `eval_batch` settings are used, no augmentation.
        device: where the detector runs.
        progress: called after each batch with the number of images it held.

    Returns:
        Boxes in pixels of the original images, clipped there; sorted by image, best first.
    """
    category_ids = category_ids_of(detector, dataset)
    detector.to(device)
    found: dict[int, list[Result]] = {}
    with torch.no_grad(), eval_mode(detector):
        for batch, indices in make_eval_batches(dataset, recipe):
            output = detector(batch.to(device))
            detections = detector.detect(output, batch.sizes)
            for index, size, one in zip(indices, batch.sizes, detections, strict=True):
                found[index] = _to_results(one, size, dataset.records[index], category_ids)
            if progress is not None:
                progress(len(indices))
    return [result for index in sorted(found) for result in found[index]]


def evaluate_dataset(
    detector: FPNDetector,
    dataset: DetectionDataset,
    recipe: Recipe,
    device: Device,
    progress: Callable[[int], None] | None = None,
) -> CocoMetrics:
    """The 12 COCO numbers and AP per class of a detector on an opened split."""
    results = detect_dataset(detector, dataset, recipe, device, progress)
    return coco_metrics(dataset.ground_truth(), results)


def evaluate(
    detector: FPNDetector,
    data: str | Path,
    split: Split = "test",
    *,
    resize_short: int | None = None,
    resize_long: int | None = None,
    batch_size: int = 8,
    device: Device | None = None,
) -> dict[str, float]:
    """The 12 COCO numbers of a detector on COCO, YOLO or Pascal VOC data.

    Args:
        detector: what `create_detector` or `load_detector` returned.
        data: the folder, or the `data.yaml` of YOLO data.
        split: which annotations to use.
        resize_short: shorter side in pixels at which the detector runs; by default what the
            detector was trained at, or a recipe's default if it does not know.
        resize_long: the longer side's limit in pixels, likewise.
        batch_size: images per forward pass.
        device: where to run; by default where the detector is.

    Returns:
        AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl, 0..1, -1 where undefined.
    """
    settings: dict[str, Any] = {"data": str(data), "eval_batch": batch_size}
    if detector.input_size is not None:
        settings["resize_short"] = [detector.input_size[0]]
        settings["resize_long"] = detector.input_size[1]
    if resize_short is not None:
        settings["resize_short"] = [resize_short]
    if resize_long is not None:
        settings["resize_long"] = resize_long
    recipe = validate_recipe(settings, "evaluate")
    wrong = out_of_reach(recipe)
    if wrong and (resize_short, resize_long) != (None, None):
        raise UserError(f"evaluate: {wrong[0]}; give both")
    if split not in get_args(Split):
        raise UserError(f"evaluate: split is {split!r}; expected one of {get_args(Split)}")
    if device is None:
        device = next(detector.parameters()).device
    return evaluate_dataset(detector, open_dataset(recipe, split), recipe, device).numbers


def _to_results(
    detections: Detections, size: tuple[int, int], record: ImageRecord, category_ids: list[int]
) -> list[Result]:
    """Boxes in pixels of the resized image to COCO results in pixels of the original one."""
    height, width = size
    boxes = detections.scaled(record.width / width, record.height / height).boxes_xyxy
    limit = boxes.new_tensor([record.width, record.height, record.width, record.height])
    boxes_xyxy = torch.minimum(boxes.clamp(min=0), limit).cpu().double()
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], 1)
    return [
        {
            "image_id": record.image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
        }
        for box, score, label in zip(
            boxes_xywh.tolist(),
            detections.scores.tolist(),
            detections.labels.tolist(),
            strict=True,
        )
    ]


def knows_classes(detector: FPNDetector, dataset: DetectionDataset) -> bool:
    """Whether the detector's classes are those of the data set."""
    try:
        category_ids_of(detector, dataset)
    except UserError:
        return False
    return True


def category_ids_of(detector: FPNDetector, dataset: DetectionDataset) -> list[int]:
    """The data set's category id of each of the detector's labels, matched by name if known.

    Raises:
        UserError: when their classes differ in number or by name.
    """
    if detector.num_classes != len(dataset.classes):
        raise UserError(
            f"the detector knows {detector.num_classes} classes, but {dataset.source} has "
            f"{len(dataset.classes)}: use the weights and the data of the same task, or cut the "
            f"detector to these classes (detdistill.match_classes)"
        )
    names = detector.classes
    if names is None:
        return list(dataset.category_ids)
    if sorted(names) != sorted(dataset.classes):
        unknown = sorted(set(names) - set(dataset.classes))
        raise UserError(
            f"the detector's class {unknown[0]!r} is not among the categories of "
            f"{dataset.source}: use the weights and the data of the same task"
        )
    ids = dict(zip(dataset.classes, dataset.category_ids, strict=True))
    return [ids[name] for name in names]
