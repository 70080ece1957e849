"""What a `Distiller` is given: refused in a sentence where it is not what it takes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from detdistill.boxes import has_area
from detdistill.distill.method import Method
from detdistill.errors import UserError
from detdistill.structures import Batch, Targets


def check_kinds(student: object, teacher: object, methods: object) -> None:
    """`UserError` where a model shows no stages, is the other, or methods are not by name."""
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    for role, model in models.items():
        if not hasattr(model, "pyramid"):
            raise UserError(
                f"the {role} is a {type(model).__name__}, which does not show its stages; give "
                f"one of create_detector or load_detector, or as_detector(a torchvision model)"
            )
    if teacher is student:
        raise UserError("student and teacher are the same object; load the teacher separately")
    if not isinstance(methods, Mapping):
        raise UserError(f'methods is {methods!r}; expected methods by name, {{"pkd": PKD()}}')


def check_method(name: str, method: object, teacher: object) -> None:
    """`UserError` for no method, one of another pair or without its teacher, or a name in use."""
    if not isinstance(method, Method):
        raise UserError(f"{name} is {method!r}; expected a method such as create_method({name!r})")
    if name == "task" or "." in name:
        raise UserError(
            f"no method can be called {name!r}: its terms start with its name; choose another"
        )
    if method.prepared:
        raise UserError(
            f"{name} was prepared for another pair and keeps its settings; make a new one"
        )
    if teacher is None and method.needs_teacher:
        raise UserError(f"{name} needs a teacher; pass --teacher RUN_OR_FILE")


def check_weights(name: str, weights: Mapping[str, float]) -> None:
    """`UserError` for weights that are negative, not finite, or all 0."""
    wrong = {term: weight for term, weight in weights.items() if not 0 <= weight < math.inf}
    if wrong:
        raise UserError(f"{name} has the weights {wrong}; expected numbers from 0 on")
    if not any(weights.values()):
        raise UserError(f"{name}: all its weights are 0; leave it out, or raise one")


def check_trainable(student: nn.Module) -> None:
    """`UserError` where no parameter is."""
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise UserError(
            "no parameter of the student is trainable, as after it was a teacher; call "
            "student.requires_grad_(True), or load it anew"
        )


def check_targets(targets: Targets, batch: Batch, num_classes: int) -> None:
    """`UserError` for sizes beyond the batch, labels outside 0..K-1, boxes that are none."""
    height, width = batch.images.shape[-2:]
    if any(h > height or w > width for h, w in batch.sizes):
        raise UserError(
            f"the batch has images of {height} x {width} pixels and sizes {list(batch.sizes)}; "
            f"expected (h, w) of each image before padding"
        )
    count = sum(len(target["labels"]) for target in batch.targets)
    corners = targets.boxes
    wrong = targets.present & ~(corners.isfinite().all(-1) & has_area(corners))
    found = (targets.labels.max(), targets.present.sum(), wrong.any())
    highest, known, any_wrong = torch.stack(found).tolist()  # one wait for the device
    if highest >= num_classes or known < count:
        which = f"label {highest}" if highest >= num_classes else "a label below 0"
        raise UserError(f"the batch holds {which}; the student has classes 0 to {num_classes - 1}")
    if any_wrong:
        image, slot = wrong.nonzero()[0].tolist()
        raise UserError(
            f"target {image} of the batch holds the box {corners[image, slot].tolist()}; expected "
            f"finite x1, y1, x2, y2 in pixels, with x1 < x2 and y1 < y2"
        )
