"""Whether the teacher can be loaded, is meant for these classes, and finds anything."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from detdistill.data import DetectionDataset
from detdistill.data.eval_loader import spread_subset
from detdistill.data.transforms import eval_size
from detdistill.detectors import FPNDetector
from detdistill.detectors.classes import known_classes, map_option
from detdistill.doctor.data import boxes_per_class
from detdistill.doctor.finding import Finding, Level, from_error
from detdistill.engine.build import load_teacher, new_teacher, teacher_file
from detdistill.errors import UserError
from detdistill.evaluation.coco import CocoMetrics
from detdistill.evaluation.run import evaluate_dataset
from detdistill.evaluation.speed import count_parameters
from detdistill.recipe import Recipe
from detdistill.registry import nearest

NOTHING, LITTLE = 0.01, 0.1
"""AP below which a teacher finds next to nothing, and below which it finds little."""

ENOUGH = 5
"""Boxes of a class in val from which on it is worth a word that none of them is found."""


@dataclass
class Teacher:
    """The teacher, as far as there is one.

    Attributes:
        model: None where none was given or it cannot be loaded.
        trained: False for a detector that is yet to be trained: it fits or not, but teaches
            nothing.
        findings: about its loading.
    """

    model: FPNDetector | None = None
    trained: bool = False
    findings: list[Finding] = field(default_factory=list)


def open_teacher(
    recipe: Recipe, classes: Sequence[str], advice: str, *, needed: bool = True
) -> Teacher:
    """Loads the recipe's teacher, or builds one that is only named.

    Args:
        recipe: names it.
        classes: of the data.
        advice: how to get a teacher.
        needed: whether any method that is tried learns from a teacher.

    Raises:
        UserError: for a file that is not there.
    """
    if recipe.teacher is None:
        text = "no teacher was given; only methods that need none can be tried"
        return Teacher(findings=[Finding("note", text, advice)])
    if teacher_file(recipe.teacher) is None:
        finding = _only_named(recipe.teacher, advice if needed else "")
        return Teacher(new_teacher(recipe, classes), findings=[finding])
    try:
        loaded = load_teacher(recipe, classes)
    except UserError as error:
        return Teacher(findings=[from_error("problem", error)])
    assert loaded is not None  # the recipe names one
    size, known = f"{count_parameters(loaded) / 1e6:.1f} M parameters", known_classes(loaded)
    used = "" if known == loaded.num_classes else f"{loaded.num_classes} of its "
    text = f"{loaded.name} from {recipe.teacher}: {size}, {used}{known} classes"
    return Teacher(loaded, trained=True, findings=[Finding("ok", text)])


def _only_named(teacher: str, advice: str) -> Finding:
    """Of one that is yet to be trained; without `advice` no method needs that."""
    text = "it is yet to be trained, so only whether it fits and what it costs can be told"
    if not advice:
        text = "no method that is tried learns from it, so it need not be trained"
    return Finding("note", f"{teacher} is a detector's name: {text}", advice)


def check_classes(
    teacher: FPNDetector, classes: Sequence[str], needed: bool, advice: str
) -> list[Finding]:
    """The teacher's classes, cut to the data's where it knows these, against them.

    Args:
        teacher: the model.
        classes: of the data.
        needed: whether equal classes are needed by any of the methods that were asked for.
        advice: how to get a teacher.
    """
    own = teacher.classes
    if own is not None and list(own) == list(classes):
        text = "the teacher's classes are the data's, in the same order"
        if known_classes(teacher) > len(classes):
            text = f"the data's {len(classes)} classes are among the teacher's; it is cut to them"
        return [Finding("ok", text)]
    if own is None and teacher.num_classes == len(classes):
        return [
            Finding(
                "warning",
                "the teacher's file names no classes; whether they stand in the data's order "
                "cannot be told",
                f"make sure that its labels 0, 1, ... are {', '.join(classes[:3])}, ...; the AP "
                "below tells, too",
            )
        ]
    if own is None:
        text = (
            f"the teacher knows {teacher.num_classes} classes, which its file does not name, the "
            f"data have {len(classes)}"
        )
        way_out = f"say which label each class has there, e.g. {map_option(classes[0], '0')}"
    else:
        unknown = [name for name in classes if name not in own]
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        text = (
            f"the teacher does not know the class {unknown[0]!r}{more} among its "
            f"{teacher.num_classes}; {nearest(unknown[0], own)}"
        )
        way_out = f"say what it calls it, {map_option(unknown[0], 'NAME')}"
    level: Level = "problem" if needed else "warning"
    return [Finding(level, text, f"{way_out}, or train a teacher on these data: {advice}")]


def check_input(teacher: FPNDetector, student: FPNDetector, recipe: Recipe) -> list[Finding]:
    """The size and the normalisation that the teacher was trained with."""
    findings, shown = [], eval_size(recipe)
    if teacher.input_size is None:
        text = f"the teacher's file does not say at which size it was trained; shown: {_x(shown)}"
        findings.append(Finding("note", text, "the AP below tells whether that suits it"))
    elif tuple(teacher.input_size) == shown:
        findings.append(Finding("ok", f"it was trained at the recipe's size, {_x(shown)}"))
    else:
        short, long = teacher.input_size
        findings.append(
            Finding(
                "warning",
                f"it was trained at {_x((short, long))}, the recipe shows images at {_x(shown)}",
                f"--set 'resize_short=[{short}]' --set resize_long={long}, or a teacher that was "
                f"trained at the recipe's size",
            )
        )
    own, other = (torch.cat((m.pixel_mean, m.pixel_std)).cpu() for m in (teacher, student))
    if not torch.allclose(own, other, atol=0.5):
        text = "its normalisation is not the student's; each normalises for itself"
        findings.append(Finding("ok", text))
    return findings


def _x(size: tuple[int, int]) -> str:
    return f"short side {size[0]}, long {size[1]}"


def measure_ap(
    teacher: FPNDetector,
    val: DetectionDataset,
    recipe: Recipe,
    device: torch.device,
    images: int,
    progress: Callable[[int, int], None],
) -> tuple[CocoMetrics, DetectionDataset]:
    """AP on at most so many images of val, at the recipe's size; and these images."""
    subset = spread_subset(val, images)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(subset))

    return evaluate_dataset(teacher, subset, recipe, device, advance), subset


def check_ap(
    metrics: CocoMetrics, subset: DetectionDataset, images: int, advice: str
) -> list[Finding]:
    """A verdict on the teacher's AP on `subset`, of a split of so many images."""
    ap, ap50 = metrics.numbers["AP"], metrics.numbers["AP50"]
    where = f"val ({len(subset)} of {images} images)"
    if ap < 0:
        label = "label val, or hold out labelled images as val"
        return [Finding("warning", f"{where} holds no boxes: AP cannot be measured", label)]
    text = f"the teacher's AP on {where} is {100 * ap:.1f}, AP50 {100 * ap50:.1f}"
    if ap < NOTHING:
        text += ": it finds next to nothing, and a student would learn that from it"
        reasons = (
            "is it trained, on these classes, at this image size? Look at what it finds "
            "(detdistill predict), or train one here: "
        )
        return [Finding("problem", text, reasons + advice)]
    if ap < LITTLE:
        more = f"a teacher that was trained longer or on more data helps more: {advice}"
        return [Finding("warning", f"{text}: it finds little", more)]
    return [Finding("ok", text), *_missed_classes(metrics.per_class, boxes_per_class(subset))]


def _missed_classes(per_class: Mapping[str, float], boxes: Mapping[str, int]) -> list[Finding]:
    missed = [n for n, ap in per_class.items() if 0 <= ap < NOTHING and boxes[n] >= ENOUGH]
    if not missed:
        return []
    shown = ", ".join(f"{name} ({boxes[name]} boxes)" for name in missed[:3])
    more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
    advice = "of these classes the student learns from the labels alone, or worse"
    return [Finding("warning", f"it finds next to nothing of {shown}{more}", advice)]
