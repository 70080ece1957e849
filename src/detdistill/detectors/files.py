"""Tensors from files of any origin. Nothing in a file is ever run."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from detdistill.errors import UserError

FOREIGN_OBJECTS = ("Unsupported global", "Unsupported class", "Trying to")
"""What `torch.load` says of objects that it will not make; all else means a damaged file."""
WRAPPERS = ("state_dict", "model")  # of OpenMMLab and timm; of torchvision's references and Swin


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
    state = loaded
    for key in WRAPPERS:
        if isinstance(loaded, dict) and key in loaded:
            state = loaded[key]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{file}: no table of tensors (a state_dict) in this file")
    return state


def _unreadable(file: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:120]
    return UserError(
        f"{file}: not a readable weights file, perhaps truncated ({type(error).__name__}: "
        f"{reason}); copy or download it again"
    )


def few(names: list[str]) -> str:
    """The first three names of a long list."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
