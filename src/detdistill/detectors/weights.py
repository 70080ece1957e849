"""Loading and saving detectors. Nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors.torch import save
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.checkpoints import (
    RESNETS,
    family_of,
    from_mmdetection,
    implied_options,
    is_mmdetection,
    require_all_classes,
    resnet_of,
    without_helpers,
)
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import create_detector, require_options, split_name
from detdistill.detectors.files import few, fill, read_state, read_weights, yolo_model
from detdistill.detectors.torchvision_models import (
    PREFIX,
    is_torchvision,
    settings_of,
    view_for,
)
from detdistill.detectors.view_base import TorchvisionView
from detdistill.errors import UserError, UserNotice
from detdistill.recipe import Options, Pixels
from detdistill.writing import written

FORMAT = 1
SUFFIX = ".safetensors"
YOLO_TENSOR = re.compile(r"(model\.)+\d+\.")


class Facts(BaseModel):
    """What `model.json` holds; more keys may stand beside."""

    model_config = ConfigDict(allow_inf_nan=False)

    format: Literal[1]
    detector: str
    options: Options
    num_classes: Annotated[int, Field(ge=1)]
    classes: list[str] | None = None
    pixel_mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    pixel_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    input_size: tuple[Pixels, Pixels] | None = None

    @model_validator(mode="after")
    def _one_name_per_class(self) -> Facts:
        if self.classes is not None and len(set(self.classes)) != self.num_classes:
            raise ValueError(
                f"{len(set(self.classes))} different classes are named, num_classes is "
                f"{self.num_classes}"
            )
        return self


def save_detector(
    detector: FPNDetector, path: str | Path, *, provenance: dict[str, Any] | None = None
) -> None:
    """Writes `path` (.safetensors) and the .json beside it: all that `load_detector` needs.

    Both files appear whole or not at all; the weights come last, so that a pair is complete.

    Raises:
        UserError: a name with another ending, which nothing would load again; a detector that was
            built from its class and does not know its options.
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise UserError(
            f"{path}: a detector is saved as {SUFFIX}; give a name that ends so, such as "
            f"{path.with_suffix(SUFFIX).name}"
        )
    module, options = detector, detector.options
    if isinstance(detector, TorchvisionView):  # the user's model, under the names that it knows
        module, options = detector.model, settings_of(detector)
    else:
        require_options(detector)
        require_all_classes(detector, path)
    facts = {
        "format": FORMAT,
        "detector": detector.name,
        "options": options,
        "num_classes": detector.num_classes,
        "classes": detector.classes,
        "pixel_mean": detector.pixel_mean.tolist(),
        "pixel_std": detector.pixel_std.tolist(),
        "input_size": detector.input_size,
        "provenance": provenance or {},
    }
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    with written(path) as stream:
        # Not `save_file`, whose files only their owner can read.
        stream.write(save(state))
        stream.flush()
        os.fsync(stream.fileno())
        with written(path.with_suffix(".json")) as file:
            file.write(json.dumps(facts, indent=1).encode())


def load_detector(
    name: str | Path, path: str | Path | None = None, *, strict: bool = True, **options: Any
) -> FPNDetector:
    """A detector with the weights of a file.

    Args:
        name: detector name, e.g. "gfl_r101"; or, for our own files, the file or run folder alone.
        path: our `model.safetensors`, a run folder, an MMDetection checkpoint, a released student
            of CrossKD or HEAD (which loads alone, and says so), or the state_dict of torchvision's
            RetinaNet, FCOS or Faster R-CNN, which becomes a view (see `as_detector`); told apart by
            their keys.
        strict: refuse a file that does not fit in every tensor.
        **options: the detector's keywords, over what the file says or implies; for torchvision's
            weights those of `torchvision_models.Settings`.

    Raises:
        UserError: missing, truncated or foreign file, code in a pickle, tensors that do not fit.
    """
    if "num_classes" in options:
        raise UserError("load_detector: the weights say num_classes; leave it out")
    file = _weights_file(Path(name if path is None else path))
    wanted = None if path is None else str(name)
    facts_file = file.with_suffix(".json")
    if file.suffix == SUFFIX and facts_file.exists():
        return _load_own(file, _read_facts(facts_file), wanted, strict, options)
    if file.suffix == ".ckpt":
        raise UserError(
            f"{file} is what --resume goes on from, not weights; give the run folder, {file.parent}"
        )
    state, classes = read_weights(file)
    if all(map(YOLO_TENSOR.match, state)):
        raise yolo_model(file)
    if wanted is None:
        raise UserError(
            f"{file}: no {facts_file.name} beside it says which detector this is; "
            f"name it, e.g. --detector gfl_r50, or --teacher gfl_r50={file.name}"
        )
    state = _student_alone(state, file)
    if is_torchvision(state):
        view, state = view_for(state, file, wanted, options)
        fill(view.model, view.name, state, file, strict)
        return view
    foreign = is_mmdetection(state)
    if foreign:
        state = from_mmdetection(state)
    if strict:
        _check_kind(state, wanted, file)
    if foreign:
        options = {**implied_options(state), **options}
    detector = create_detector(wanted, _count_classes(state, wanted, file), **options)
    fill(detector, detector.name, state, file, strict)
    detector.classes = _fitting_names(classes, detector, file)
    return detector


def _fitting_names(
    classes: list[str] | None, detector: FPNDetector, file: Path
) -> list[str] | None:
    """The names that a checkpoint has, unless they cannot be those of its detector's classes."""
    if classes is None or len(set(classes)) == len(classes) == detector.num_classes:
        return classes
    twice = sorted({name for name in classes if classes.count(name) > 1})
    fault = f"{len(classes)} classes ({few(classes)}) but predicts {detector.num_classes}"
    if twice:
        fault = f"{twice[0]!r} more than once"
    warnings.warn(
        f"{file} names {fault}: the names are left out; class_map takes labels instead",
        UserNotice,
        stacklevel=3,
    )
    return None


def _student_alone(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    kept, helpers = without_helpers(state)
    if helpers:
        parts = sorted({name.partition(".")[0] for name in helpers})
        warnings.warn(
            f"{file}: the student alone is loaded; left out: {len(helpers)} tensors of what helped "
            f"to train it ({', '.join(parts)})",
            UserNotice,
            stacklevel=3,
        )
    return kept


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        file = path / "model.safetensors"
        if not file.exists():
            raise UserError(f"{path}: no model.safetensors in this folder; is the run finished?")
        return file
    if not path.exists():
        raise UserError(f"{path}: no such weights file or run folder")
    if path.suffix == ".json":
        raise UserError(f"{path}: not the weights; give the .safetensors file beside it")
    return path


def _read_facts(path: Path) -> Facts:
    try:
        return Facts.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            place = "".join(f"{part}: " for part in first["loc"])
            reason = place + first["msg"].removeprefix("Value error, ")
        raise UserError(
            f"{path}: not a model.json that this version reads ({reason}); copy it again from "
            f"where {path.stem}.safetensors was written"
        ) from None


def _load_own(
    file: Path, facts: Facts, wanted: str | None, strict: bool, options: dict[str, Any]
) -> FPNDetector:
    if wanted is not None and wanted != facts.detector:
        raise UserError(f"{file} holds {facts.detector}, not {wanted}; leave the name out")
    if facts.detector.startswith(PREFIX):
        given = {**facts.options, **options}
        view, state = view_for(read_state(file), file, facts.detector, given)
        fill(view.model, view.name, state, file, strict)
        if view.num_classes != facts.num_classes:
            raise UserError(
                f"{file.with_suffix('.json')}: its labels are {view.num_classes}, its num_classes "
                f"{facts.num_classes}; save the detector again"
            )
        view.classes = facts.classes
        if not {"min_size", "max_size"} & options.keys():
            view.input_size = facts.input_size
        return view
    given = dict(facts.options)
    if "pretrained" in given:  # the file has the weights; an own family may know no such option
        given["pretrained"] = False
    given |= options
    try:
        detector = create_detector(facts.detector, facts.num_classes, **given)
    except UserError as error:
        raise UserError(f"{file.with_suffix('.json')}: {error}") from None
    detector.classes, detector.input_size = facts.classes, facts.input_size
    detector.pixel_mean.copy_(torch.tensor(facts.pixel_mean))
    detector.pixel_std.copy_(torch.tensor(facts.pixel_std))
    fill(detector, detector.name, read_state(file), file, strict)
    return detector


def _check_kind(state: dict[str, Tensor], wanted: str, file: Path) -> None:
    """`UserError` for the tensors of another family, or of a ResNet of another depth."""
    family, _ = split_name(wanted, {})
    short = wanted[len(family) + 1 :]
    depth, _, ending = short.partition("_")  # "r50_caffe_gn"
    held_family, held_depth = family_of(state) or family, resnet_of(state) or depth
    if depth not in RESNETS.values():
        held_depth = depth
    if (held_family, held_depth) != (family, depth):
        held = "_".join(part for part in (held_family, held_depth, ending) if part)
        raise UserError(f"{file} holds the weights of {held}, not of {wanted}; name it {held}")


def _count_classes(state: dict[str, Tensor], name: str, file: Path) -> int:
    detector = create_detector(name, 1, fpn_channels=8)
    key = "logits.bias" if isinstance(detector, DenseDetector) else "roi_heads.0.logits.bias"
    if key not in state or state[key].dim() != 1:
        raise UserError(
            f"{file}: these are not the weights of {name}, its tensors are called "
            f"{few(list(state))}; name the detector that it was trained as"
        )
    if isinstance(detector, DenseDetector):
        return max(1, len(state[key]) // detector.grid.per_location)
    return max(1, len(state[key]) - 1)
