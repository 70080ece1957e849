"""Tensors from files of any origin. Nothing in a file is ever run."""

from __future__ import annotations

import errno
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from detdistill.errors import UserError, UserNotice

FOREIGN_OBJECTS = ("Unsupported global", "Unsupported class", "Trying to", "Can only")
"""What `torch.load` says of objects that it will not make; all else means a damaged file."""

UNKNOWN_CODE = "Unsupported operand"
"""What `torch.load` says of a pickle that it did not write."""

METADATA = frozenset(
    "mmengine mmcv mmdet mmcls addict numpy argparse collections datetime pathlib".split()
)
"""Packages whose objects stand beside the tensors of a checkpoint: logs, settings, dates."""

MAPPINGS = frozenset({"ConfigDict", "Dict"})  # filled item by item

YOLO_PACKAGES = ("ultralytics.", "models.yolo.", "models.common.")
COUNTER = ".num_batches_tracked"
WRAPPERS = ("state_dict", "model")  # of OpenMMLab and timm; of torchvision's references and Swin


class _Inert:
    """Stands where a checkpoint names an object of `METADATA`: takes anything, does nothing."""

    def __new__(cls, *_: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_state(file: Path) -> dict[str, Tensor]:
    """As `read_weights`, without the classes."""
    return read_weights(file)[0]


def read_weights(file: Path) -> tuple[dict[str, Tensor], list[str] | None]:
    """Tensors by name from .safetensors, or from a pickle without running code from it.

    Returns:
        The tensors; and the names of the classes where an MMDetection checkpoint has them.

    Raises:
        UserError: what is damaged, holds objects of unknown packages, or no table of tensors.
    """
    try:
        loaded = load_file(file) if file.suffix == ".safetensors" else _read_pickle(file)
    except UserError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise _unreadable(file, error) from None
    state = loaded
    for key in WRAPPERS:
        if isinstance(loaded, dict) and key in loaded:
            state = loaded[key]
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(
            f"{file}: no table of tensors (a state_dict) in this file; save one: "
            f'torch.save({{"state_dict": model.state_dict()}}, "clean.pth")'
        )
    if not state:
        raise UserError(f"{file}: the table of tensors is empty; export the weights again")
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(
                f"{file}: {name} is not finite everywhere: the training that wrote it had "
                f"exploded; take an earlier checkpoint"
            )
    return state, _class_names(loaded)


def _class_names(loaded: Any) -> list[str] | None:
    """Where MMDetection 2.x (`meta.CLASSES`) and 3.x (`meta.dataset_meta.classes`) keep them."""
    meta = loaded.get("meta")
    if not isinstance(meta, Mapping):
        return None
    places = (meta, meta.get("dataset_meta"))
    for place in (p for p in places if isinstance(p, Mapping)):
        names = place.get("classes", place.get("CLASSES"))
        if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names):
            return list(names)
    return None


def _read_pickle(file: Path) -> Any:
    """By torch's own safe reader, which makes tensors and plain values and calls nothing else.

    A checkpoint of mmengine or of torchvision's scripts holds logs and settings besides. Where it
    names only such, they are read as `_Inert` objects: their packages are not even imported.
    """
    with warnings.catch_warnings(action="ignore"):  # about protocols, before our sentence
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            if not any(sign in str(error) for sign in FOREIGN_OBJECTS):
                raise
        try:
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
        except Exception:  # the older format of torch.save cannot be searched
            names = []
        if not names or any(name.partition(".")[0] not in METADATA for name in names):
            raise _holds_code(file, names)
        stand_ins: list[Any] = [
            (OrderedDict if name.rpartition(".")[2] in MAPPINGS else _Inert, name) for name in names
        ]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # objects built in a way that stand-ins do not know
            raise _holds_code(file, names) from None


def yolo_model(file: Path) -> UserError:
    """What is said of weights that many will try."""
    return UserError(
        f"{file} is a YOLO model, which is none of our detectors; train a teacher on your data "
        f"instead: detdistill train --detector gfl_r50 --data FOLDER --out runs/teacher"
    )


def _holds_code(file: Path, names: list[str]) -> UserError:
    if any(name.startswith(YOLO_PACKAGES) for name in names):
        return yolo_model(file)
    found = f" ({few(names)})" if names else ""
    return UserError(
        f"{file} holds Python objects besides tensors{found}, which could run code and are not "
        f"loaded; save its plain tensors in the environment it came from: "
        f'torch.save({{"state_dict": model.state_dict()}}, "clean.pth")'
    )


def _unreadable(file: Path, error: Exception) -> UserError:
    # torch looks for the end of a short archive before its beginning: that is damage, too.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return UserError(f"{file}: cannot be read: {error.strerror or error}")
    with file.open("rb") as stream:
        start = stream.read(20)
    holds = None
    if start[8:].startswith(b"{"):  # eight bytes, then JSON
        holds = ".safetensors"
    elif start.startswith((b"PK", b"\x80")):  # ZIP or pickle
        holds = ".pth"
    if not start:
        reason = "it is empty"
    elif holds is None:
        reason = f"it begins with {start!r}"
    elif (holds == ".safetensors") != (file.suffix == ".safetensors"):
        return UserError(f"{file} holds what a {holds} file holds; give it a name that ends so")
    elif UNKNOWN_CODE in str(error):
        return UserError(
            f"{file} is a Python pickle that torch.save did not write, which could run code and is "
            f"not loaded; save its plain tensors: torch.save(state_dict, 'clean.pth')"
        )
    else:
        # torch's own advice, to load the file unsafely, stands before the reason and after it.
        told = " ".join(str(error).rpartition("UnpicklingError:")[2].split())
        told = told.rpartition("WeightsUnpickler error: ")[2].split(". ")[0]
        reason = f"perhaps truncated ({type(error).__name__}: {told[:120]})"
    return UserError(f"{file}: not a readable weights file: {reason}; copy or download it again")


def misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Every tensor of a file that a module lacks, and the reverse, and every other shape.

    A counter of BatchNorm may be missing: frozen ones and files from before 2019 have none.
    """
    faults = [f"missing {k}" for k in own if k not in state and not k.endswith(COUNTER)]
    faults += [f"left over {k}" for k in state if k not in own]
    return faults + [
        f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]


def fill(module: nn.Module, name: str, state: dict[str, Tensor], file: Path, strict: bool) -> None:
    """Loads what fits; `UserError` with every misfit, or a notice of them if not `strict`."""
    own = module.state_dict()
    faults = misfits(own, state)
    fault, every = f"{file} does not fit {name} in {len(faults)} tensors", "; ".join(faults)
    if faults and strict:
        raise UserError(
            f"{fault}; choose the detector it was trained as, or take what fits by strict=False "
            f"(detdistill convert --partial): {every}"
        )
    if faults:
        warnings.warn(f"{fault}, which were left as they are: {every}", UserNotice, stacklevel=3)
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    module.load_state_dict(fitting, strict=False)


def few(names: list[str]) -> str:
    """The first three names of a long list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
