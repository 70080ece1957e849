"""Training curves in TensorBoard, Weights & Biases or Trackio, beside `metrics.jsonl`."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from detdistill.errors import UserError
from detdistill.recipe import Recipe

PROJECT = "detdistill"


class Tracker(Protocol):
    """What follows a run."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Takes the numbers of a step."""

    def close(self) -> None:
        """Writes what is still held."""


def require_trackers(recipe: Recipe) -> None:
    """`UserError` where a package that the recipe's `trackers` need is not installed."""
    missing = [name for name in recipe.trackers if find_spec(name) is None]
    if missing:
        raise UserError(
            f"trackers: {missing[0]} is not installed; run pip install 'detdistill[{missing[0]}]', "
            "or leave it out"
        )


def open_trackers(recipe: Recipe, out: Path, step: int) -> list[Tracker]:
    """One for each name in the recipe's `trackers`; a run that goes on does so at `step`."""
    return [
        TensorBoard(out, step) if name == "tensorboard" else Service(name, recipe, out)
        for name in recipe.trackers
    ]


class TensorBoard:
    """Event files in the run's folder `tensorboard`."""

    def __init__(self, out: Path, step: int) -> None:
        """What was written after `step`, before an interruption, is not shown."""
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Each number is a curve."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self.writer.close()


class Service:
    """Weights & Biases, or Trackio, which has the same functions."""

    def __init__(self, package: str, recipe: Recipe, out: Path) -> None:
        """The run is called like its folder, and found again by it when it goes on."""
        service: Any = importlib.import_module(package)
        name = "/".join(out.absolute().parts[-2:])
        given: dict[str, Any] = {"project": PROJECT, "name": name, "resume": "allow"}
        if package == "wandb":  # Trackio finds a run by its name, and keeps files by itself
            number = hashlib.sha256(str(out.absolute()).encode()).hexdigest()[:16]
            given |= {"id": number, "dir": str(out)}
        try:
            self.run = service.init(config=recipe.model_dump(mode="json"), **given)
        except Exception as error:  # of any kind: no account, no network, another version
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise UserError(
                f"trackers: {package} cannot start: {reason}; set it up, or leave it out, and go "
                "on with --resume"
            ) from None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Each number is a curve."""
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        """Ends the run."""
        self.run.finish()


def curves(kind: str, values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of `metrics.jsonl` under the names of their curves.

    Losses are called `raw/task/cls` and `weighted/task/cls`, accuracies `val/AP`, 0..1; the teacher
    has none.
    """
    if kind == "eval":
        return {f"val/{name}": value for name, value in values["metrics"].items() if value >= 0}
    return dict(_flat(values)) if kind == "step" else {}


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{term}", number) for term, number in value.items())
        else:
            yield name, value
