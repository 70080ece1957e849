"""Training steps put together by hand, for losses worked out on paper."""

from types import SimpleNamespace

import torch

from detdistill.distill import Step
from detdistill.structures import Assignment, DenseOutput, Predictions, Pyramid, Targets

IMAGE = ((32, 32),)


def output(logits=(), pyramid=()):
    """Of one detector: per level logits (B, A, K, H, W) and pyramid maps (B, C, H, W)."""
    strides = tuple(8 * 2**level for level in range(len(pyramid)))
    return DenseOutput(Predictions(list(logits), []), {}, [], Pyramid(list(pyramid), strides))


def assignment(matched, labels):
    """Of anchors matched (B, P) to the objects of labels (B, N)."""
    matched, labels = torch.tensor(matched), torch.tensor(labels)
    positive = matched >= 0
    return Assignment(
        labels=torch.where(positive, labels.gather(1, matched.clamp(min=0)), 99),
        weights=torch.ones(matched.shape),
        positive=positive,
        boxes=torch.zeros(*matched.shape, 4),
        matched=matched,
        num_positive=positive.sum(1).clamp(min=1).sum().float(),
    )


def step(student, teacher, labels=((0,),), of_student=None, of_teacher=None):
    labels = torch.tensor(labels)
    targets = Targets(torch.zeros(*labels.shape, 4), labels, IMAGE * len(labels))
    model = SimpleNamespace(reduce="local")
    return Step(student, teacher, model, model, targets, of_student, 0, of_teacher)


def spread_predictions(*models):
    """Fresh detectors predict almost the same everywhere; gives their heads larger weights."""
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                body = name.removeprefix("model.").startswith(("backbone.", "fpn."))
                if parameter.dim() == 4 and not body:
                    parameter.normal_(std=0.1)
                elif name == "init_points.bias":  # RepPoints' first boxes: 5 strides wide
                    parameter.normal_(std=2.5)
