"""Files of a run, each of which appears whole or not at all."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from detdistill.errors import UserError
from detdistill.recipe import Recipe, completed, dump_recipe, read_yaml
from detdistill.writing import written

# Settings that change how a run is carried out, not what comes out of it.
FREE = {
    *("workers", "cache", "eval_batch", "accelerator"),
    *("log_every", "trackers", "checkpoint_every"),
}

LOCK_TRIES = 6  # half a second apart

STATE = {"step", "seconds", "best_ap", "val_ap", "teacher_ap"}
STATE |= {"distiller", "optimizer", "precision", "random"}
"""Keys of a checkpoint."""


def write_text(path: Path, text: str) -> None:
    """Replaces a text file atomically; bytes of a file name that are no UTF-8 are spelled out."""
    with written(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Replaces a checkpoint atomically; a power cut leaves the old one."""
    write_next_checkpoint(path, state)
    keep_next_checkpoint(path)


def write_next_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint beside the old one, which stays until `keep_next_checkpoint`."""
    with written(_next(path)) as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own error hides that of the disk, and Ctrl+C
            hidden = error.__context__
            raise hidden if isinstance(hidden, OSError | KeyboardInterrupt) else error from None
        file.flush()
        os.fsync(file.fileno())


def keep_next_checkpoint(path: Path) -> None:
    """Replaces the old checkpoint by the one that was written beside it."""
    os.replace(_next(path), path)


def drop_next_checkpoint(path: Path) -> None:
    """Removes what `write_next_checkpoint` wrote, if it is still there."""
    _next(path).unlink(missing_ok=True)


def _next(path: Path) -> Path:
    return path.with_name(path.name + ".next")


def last_good(out: Path) -> str:
    """Where a run that exploded can be taken up, for a sentence."""
    path = out / "last.ckpt"
    return f"the last good checkpoint is {path}" if path.exists() else "there is no checkpoint yet"


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The state, or None when there is no checkpoint yet."""
    if not path.exists():
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # about protocols, before our sentence
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):
        raise  # nothing that deleting the checkpoint would mend
    except Exception as error:  # a damaged file can raise anything
        raise unusable_checkpoint(path, type(error).__name__) from None
    if not isinstance(state, dict) or not STATE <= state.keys():
        raise unusable_checkpoint(path, "it holds something else")
    return state


def unusable_checkpoint(path: Path, reason: str) -> UserError:
    """What to tell about a `last.ckpt` that cannot be resumed from."""
    return UserError(
        f"{path}: not a checkpoint of this run, or damaged ({reason}); delete it to start the run "
        f"again"
    )


def check_run(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuses a folder that is not this run's; writes nothing."""
    stored = out / "recipe.yaml"
    if stored.exists():
        if not resume:
            raise UserError(f"{out} holds another run; choose another --out, or add --resume")
        changed = changed_settings(stored, recipe)
        if changed:
            key, (before, now) = next(iter(changed.items()))
            raise UserError(
                f"{out} holds a run with {key}: {before}, now it is {now}; resume with the same "
                f"recipe, or choose another --out"
            )
    elif out.exists() and (not out.is_dir() or any(p.suffix != ".tmp" for p in out.iterdir())):
        raise UserError(f"{out} is no run folder and not empty; choose another --out")


def changed_settings(stored: Path, recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """What a run's recipe file had and the recipe has, by the settings that shape the result."""
    before, now = completed(read_yaml(stored)), recipe.model_dump()
    return {k: (before[k], now[k]) for k in now if k not in FREE and before[k] != now[k]}


def check_inputs(out: Path, state: dict[str, Any] | None, inputs: dict[str, str]) -> None:
    """Refuses to go on with a run whose data or teacher are not those that it began with."""
    for what, before in (state or {}).get("inputs", {}).items():
        if inputs.get(what) != before:
            raise UserError(
                f"{out}: its {what} changed since this run began; put it back as it was, or "
                f"choose another --out"
            )


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Makes a folder and keeps other runs and studies out of it; a killed process lets go of it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror}); choose another --out"
        ) from None
    if os.name != "posix":
        yield  # folders cannot be locked there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    import fcntl  # not everywhere

    for _ in range(LOCK_TRIES):
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # perhaps by workers of a killed run, which end within a second
            time.sleep(0.5)
        except OSError:
            return  # a file system without locks
    raise UserError(
        f"{folder}: another process is writing there; wait until it ends, or choose another --out"
    )


def start_run(out: Path, recipe: Recipe, resume: bool) -> None:
    """Writes the fully resolved recipe into the run folder, which `exclusive` made."""
    check_run(out, recipe, resume)  # again: another run may have begun and ended in the meantime
    write_text(out / "recipe.yaml", dump_recipe(recipe))
