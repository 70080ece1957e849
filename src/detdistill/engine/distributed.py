"""Lightning Fabric for one process or many."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.precision import MixedPrecision, Precision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import Tensor

from detdistill.data.loader import end_with_parent
from detdistill.errors import UserError, is_first_here
from detdistill.recipe import Recipe
from detdistill.structures import Batch
from detdistill.writing import disk_faults_told

T = TypeVar("T")

PATIENCE = timedelta(hours=3)
"""How long processes wait for each other: while the first evaluates on val, all others do."""


MARK = "DETDISTILL_STOPPED"
"""Environment variable: the file that the first process that has to stop makes."""

GRACE = 2.0  # seconds, for the sentence of the process that had to stop

_running = threading.Event()  # between the begin and the end of a run


class _KeepInputs:
    """Batches pass unchanged: boxes must not be rounded to half precision."""

    def convert_input(self, data: Any) -> Any:
        return data


class FullPrecision(_KeepInputs, Precision):
    """float32."""


class HalfPrecision(_KeepInputs, MixedPrecision):
    """Autocast, with loss scaling for float16."""


def pick_device(recipe: Recipe) -> str:
    """What the recipe runs on: "cuda" or "cpu".

    Raises:
        UserError: for a device or a precision that this machine lacks.
    """
    device = recipe.accelerator
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.device_count() < recipe.devices:
        raise UserError(
            f"recipe: {recipe.devices} CUDA devices wanted, {torch.cuda.device_count()} found; "
            f"lower devices, or use --set accelerator=cpu"
        )
    if recipe.precision == "fp16" and device == "cpu":
        raise UserError("recipe: precision fp16 needs a CUDA device; use bf16 or fp32 on the CPU")
    return device


def launch(recipe: Recipe) -> Fabric:
    """Starts the processes of a recipe and sets determinism.

    Raises:
        UserError: as `pick_device`.
    """
    device = pick_device(recipe)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it advises, in every process
    plugin: Precision = FullPrecision()
    if recipe.precision == "bf16":
        plugin = HalfPrecision("bf16-mixed", device)
    elif recipe.precision == "fp16":
        plugin = HalfPrecision("16-mixed", device)
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or CUDA refuses
        torch.use_deterministic_algorithms(True)
    several = recipe.devices * recipe.nodes > 1
    if several:
        _end_together()
    fabric = Fabric(
        accelerator=device,
        devices=recipe.devices,
        num_nodes=recipe.nodes,
        strategy=DDPStrategy(timeout=PATIENCE) if several else "auto",
        plugins=[plugin],
    )
    fabric.launch()
    return fabric


def place(batch: Batch, recipe: Recipe, device: torch.device) -> Batch:
    """The batch where the recipe wants it and as it wants it in memory."""
    batch = batch.to(device)
    if not recipe.channels_last:
        return batch
    images = batch.images.contiguous(memory_format=torch.channels_last)
    return Batch(images, batch.sizes, batch.targets, batch.image_ids)


def gathered(own: T) -> list[T]:
    """A plain value of each process, in the order of the processes, in each of them."""
    if not dist.is_available() or not dist.is_initialized():
        return [own]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, own)
    return values


def all_image_ids(own: Sequence[int]) -> list[int]:
    """The image ids of this step's batch in all processes."""
    return [image_id for ids in gathered(list(own)) for image_id in ids]


def random_states(device: torch.device) -> list[dict[str, Tensor]]:
    """Of each process the state of torch's generators, from which samplers of proposals draw."""
    own = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        own["cuda"] = torch.cuda.get_rng_state(device)
    return gathered(own)


def restore_random_state(
    states: Tensor | list[dict[str, Tensor]], rank: int, device: torch.device
) -> None:
    """Undoes `random_states` in one process.

    Older checkpoints hold the CPU's state of the first process alone; the others keep theirs.
    """
    if isinstance(states, Tensor):
        states = [{"cpu": states}]
    if rank < len(states):
        torch.set_rng_state(states[rank]["cpu"])
        if device.type == "cuda" and "cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["cuda"], device)


def _end_together() -> None:
    """Of the processes that this one will start, or that it is one of, none survives the others."""
    if "LOCAL_RANK" not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="detdistill-"))
        os.environ[MARK] = str(folder / "stopped")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        threading.Thread(target=_end_if_left_waiting, args=(folder,), daemon=True).start()
    elif MARK in os.environ and not is_first_here():
        end_with_parent(os.getppid())


def _end_if_left_waiting(folder: Path) -> None:
    """The first process may wait for ever for one that had to stop."""
    while not ((folder / "stopped").exists() and _running.is_set()):
        time.sleep(0.5)
    time.sleep(GRACE)
    if _running.is_set():
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(2)


@contextmanager
def one_voice() -> Iterator[None]:
    """Lets one process of a machine tell what is wrong, whichever finds it, and all of them end."""
    mark = os.environ.get(MARK)
    if mark is None:
        yield
        return
    _running.set()
    try:
        with disk_faults_told():
            yield
    except UserError as error:
        try:
            Path(mark).touch(exist_ok=False)
            error.told = False
        except OSError:
            error.told = True
        _leave_last()
        raise
    except KeyboardInterrupt:
        _leave_last()
        raise
    except RuntimeError:
        if Path(mark).parent.exists() and not Path(mark).exists():
            raise
        # A collective call, whose other side had to stop.
        _leave_last()
        silent = UserError("another process of this run had to stop")
        silent.told = True
        raise silent from None
    finally:
        _running.clear()


def _leave_last() -> None:
    """Lets the first process end first: its launcher kills it when another is gone."""
    if not is_first_here():
        atexit.register(time.sleep, 60)  # `end_with_parent` will not let it sleep as long
