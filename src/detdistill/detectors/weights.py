"""Loading and saving detectors. Nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, Field, ValidationError
from safetensors.torch import load_file, save
from torch import Tensor

from detdistill.detectors.base import FPNDetector
from detdistill.detectors.checkpoints import from_mmdetection, implied_options, is_mmdetection
from detdistill.detectors.dense import DenseDetector
from detdistill.detectors.factory import create_detector
from detdistill.errors import UserError

FORMAT = 1
FOREIGN_OBJECTS = ("Unsupported global", "Unsupported class", "Trying to")
"""What `torch.load` says of objects that it will not make; all else means a damaged file."""


class Facts(BaseModel):
    """What `model.json` holds; more keys may stand beside."""

    format: Literal[1]
    detector: str
    options: dict[str, Any]
    num_classes: Annotated[int, Field(ge=1)]
    classes: list[str] | None = None
    pixel_mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    pixel_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)]
    input_size: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] | None = None


def save_detector(
    detector: FPNDetector, path: str | Path, *, provenance: dict[str, Any] | None = None
) -> None:
    """Writes `path` (.safetensors) and the .json beside it: all that `load_detector` needs.

    Both files appear whole or not at all; the weights come last, so that a pair is complete.
    """
    path = Path(path)
    facts = {
        "format": FORMAT,
        "detector": detector.name,
        "options": detector.options,
        "num_classes": detector.num_classes,
        "classes": detector.classes,
        "pixel_mean": detector.pixel_mean.tolist(),
        "pixel_std": detector.pixel_std.tolist(),
        "input_size": detector.input_size,
        "provenance": provenance or {},
    }
    state = {k: v.detach().cpu().contiguous() for k, v in detector.state_dict().items()}
    facts_file, temporary = path.with_suffix(".json"), path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    os.replace(temporary, facts_file)
    # Not `save_file`, whose files only their owner can read.
    with temporary.open("wb") as stream:
        stream.write(save(state))
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def load_detector(
    name: str | Path, path: str | Path | None = None, *, strict: bool = True, **options: Any
) -> FPNDetector:
    """A detector with the weights of a file.

    Args:
        name: detector name, e.g. "gfl_r101"; or, for our own files, the file or run folder alone.
        path: our `model.safetensors`, an MMDetection `.pth`, or a run folder.
        strict: refuse a file that does not fit in every tensor.
        **options: the detector's keywords, over what the file says or implies.

    Raises:
        UserError: missing, truncated or foreign file, code in a pickle, tensors that do not fit.
    """
    file = _weights_file(Path(name if path is None else path))
    wanted = None if path is None else str(name)
    facts_file = file.with_suffix(".json")
    if file.suffix == ".safetensors" and facts_file.exists():
        return _load_own(file, _read_facts(facts_file), wanted, strict, options)
    if wanted is None:
        raise UserError(
            f"{file}: no {facts_file.name} beside it says which detector this is; "
            f"name it, e.g. --detector gfl_r50"
        )
    state = read_state(file)
    if is_mmdetection(state):
        state = from_mmdetection(state)
        options = {**implied_options(state), **options}
    detector = create_detector(wanted, _count_classes(state, wanted, file), **options)
    _fill(detector, state, file, strict)
    return detector


def _weights_file(path: Path) -> Path:
    if path.is_dir():
        file = path / "model.safetensors"
        if not file.exists():
            raise UserError(f"{path}: no model.safetensors in this folder; is the run finished?")
        return file
    if not path.exists():
        raise UserError(f"{path}: no such weights file or run folder")
    return path


def _read_facts(path: Path) -> Facts:
    try:
        return Facts.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UserError(f"{path}: not a model.json that this version reads ({reason})") from None


def _load_own(
    file: Path, facts: Facts, wanted: str | None, strict: bool, options: dict[str, Any]
) -> FPNDetector:
    if wanted is not None and wanted != facts.detector:
        raise UserError(f"{file} holds {facts.detector}, not {wanted}; leave the name out")
    given = {**facts.options, "pretrained": False, **options}
    try:
        detector = create_detector(facts.detector, facts.num_classes, **given)
    except UserError as error:
        raise UserError(f"{file.with_suffix('.json')}: {error}") from None
    detector.classes, detector.input_size = facts.classes, facts.input_size
    detector.pixel_mean.copy_(torch.tensor(facts.pixel_mean))
    detector.pixel_std.copy_(torch.tensor(facts.pixel_std))
    _fill(detector, read_state(file), file, strict)
    return detector


def read_state(file: Path) -> dict[str, Tensor]:
    """Tensors by name from .safetensors, or from a pickle without running code from it."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with warnings.catch_warnings(action="ignore"):  # about protocols, before our sentence
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if not any(sign in str(error) for sign in FOREIGN_OBJECTS):
            raise _unreadable(file, error) from None
        raise UserError(
            f"{file} holds Python objects besides tensors, which could run code and are not "
            f"loaded; save its plain tensors in the environment it came from: "
            f'torch.save({{"state_dict": model.state_dict()}}, "clean.pth")'
        ) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise _unreadable(file, error) from None
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file}: no table of tensors (a state_dict) in this file")
    return state


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(
        f"{file}: not a readable weights file, perhaps truncated ({type(error).__name__}: "
        f"{reason}); copy or download it again"
    )


def _count_classes(state: dict[str, Tensor], name: str, file: Path) -> int:
    detector = create_detector(name, 1, fpn_channels=8)
    key = "logits.bias" if isinstance(detector, DenseDetector) else "roi_heads.0.logits.bias"
    if key not in state or state[key].dim() != 1:
        raise UserError(f"{file}: these are not the weights of {name}: {_few(list(state))}")
    if isinstance(detector, DenseDetector):
        return max(1, len(state[key]) // detector.grid.per_location)
    return max(1, len(state[key]) - 1)


def _fill(detector: FPNDetector, state: dict[str, Tensor], file: Path, strict: bool) -> None:
    own = detector.state_dict()
    faults = [f"missing {k}" for k in own if k not in state]
    faults += [f"left over {k}" for k in state if k not in own]
    faults += [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    if faults and strict:
        raise UserError(
            f"{file} does not fit {detector.name} in {len(faults)} tensors: {'; '.join(faults)}; "
            f"choose the detector it was trained as, or load with strict=False"
        )
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    detector.load_state_dict(fitting, strict=False)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
