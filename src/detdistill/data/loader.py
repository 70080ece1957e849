"""Batches: which images, in which order, prepared by worker processes that hold no state.

A sample is keyed by (epoch, index) and draws from a generator made of (seed, epoch, index), so a
batch depends on its step alone: not on the worker, nor on where a run was interrupted.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detdistill.data import transforms
from detdistill.data.dataset import DetectionDataset
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from detdistill.structures import Batch, pad_images

AUTO_CACHE_BYTES = 2 * 1024**3
"""`cache: auto` holds the decoded images of a set in memory up to this, over all processes."""

# Forked workers share what is held in memory, and know their parent; from Python 3.14 on this is
# no longer Linux's default.
_FORK = "fork" if sys.platform == "linux" else None

Key = tuple[int, int]  # (epoch, index)
Arrays = list[NDArray[Any]]


class TrainBatches:
    """Endless training batches of one process, from any step on."""

    def __init__(
        self, dataset: DetectionDataset, recipe: Recipe, rank: int, world_size: int
    ) -> None:
        """See `make_train_batches`."""
        self.batch_size = recipe.batch_size
        self.steps_per_epoch = math.ceil(len(dataset) / self.batch_size)
        self._part = self.batch_size // recipe.accumulate
        self._share = self._part // world_size
        self._rank = rank
        self._recipe = recipe
        self._wide = [record.width >= record.height for record in dataset.records]
        self._samples = _TrainSamples(dataset, recipe)
        self._plan = lru_cache(maxsize=1)(self._plan_epoch)

    def __len__(self) -> int:
        """Optimisation steps per epoch."""
        return self.steps_per_epoch

    def batches(self, first_step: int) -> Generator[Batch, None, None]:
        """Endless batches from a step on, `accumulate` parts of each; closing ends the workers."""
        first = first_step * self._recipe.accumulate
        return load_batches(self._samples, map(self.keys, count(first)), self._recipe)

    def keys(self, micro: int) -> list[Key]:
        """This process's slice of a part of the batch of a step."""
        step, part = divmod(micro, self._recipe.accumulate)
        epoch, place = divmod(step, self.steps_per_epoch)
        indices = self._plan(epoch)[place]
        start = part * self._part + self._rank * self._share
        return [(epoch, index) for index in indices[start : start + self._share]]

    def _plan_epoch(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, for all processes together."""
        generator = transforms.sample_generator(self._recipe.seed, epoch, -1)
        order = torch.randperm(len(self._wide), generator=generator).tolist()
        batches: list[list[int]] = []
        groups: dict[bool, list[int]] = {True: [], False: []}
        for index in order:
            group = groups[self._wide[index] or not self._recipe.group_by_aspect]
            group.append(index)
            if len(group) == self.batch_size:
                batches.append(group.copy())
                group.clear()
        rest = groups[True] + groups[False]
        batches += [rest[i : i + self.batch_size] for i in range(0, len(rest), self.batch_size)]
        # The last batch is filled up from the epoch's beginning: every step has the same size.
        missing = self.batch_size - len(batches[-1])
        batches[-1] += [order[i % len(order)] for i in range(missing)]
        return batches


def make_train_batches(
    dataset: DetectionDataset,
    recipe: Recipe,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainBatches:
    """Training batches of one process.

    The batch of a step comes in `accumulate` parts, which all processes share.
    Small sets are decoded here, once, before workers are forked, which then share the memory.

    Args:
        dataset: the training split.
        recipe: sizes, augmentation, seed, workers, cache.
        rank: this process.
        world_size: number of processes; it divides the batch.
    """
    if (recipe.batch_size // recipe.accumulate) % world_size:
        raise UserError(
            f"batch_size {recipe.batch_size} cannot be shared by {world_size} processes and "
            f"accumulate {recipe.accumulate}; make it a multiple of both together"
        )
    return TrainBatches(dataset, recipe, rank, world_size)


@dataclass(frozen=True)
class Packed:
    """A batch on its way out of a worker.

    NumPy arrays travel through the pipe. Tensors would take a file descriptor each and room in
    /dev/shm, and a run would die of a low `ulimit -n` or of a container's 64 MB.
    """

    images: NDArray[np.uint8]
    sizes: list[tuple[int, int]]
    boxes: Arrays
    labels: Arrays
    image_ids: list[int]

    def batch(self) -> Batch:
        """As everyone else knows it."""
        targets = [
            {"boxes": torch.from_numpy(boxes), "labels": torch.from_numpy(labels)}
            for boxes, labels in zip(self.boxes, self.labels, strict=True)
        ]
        return Batch(torch.from_numpy(self.images), self.sizes, targets, self.image_ids)

    def pin_memory(self) -> Batch:
        """Called by `DataLoader`."""
        return self.batch().pin_memory()


class Samples(Dataset[Any]):
    """Prepares whole batches; `DataLoader` calls it in the workers."""

    def __init__(self, dataset: DetectionDataset) -> None:
        """A subclass says what happens to each image."""
        self.dataset = dataset

    def __getitems__(self, keys: list[Key]) -> Packed | UserError:
        """A batch, or what is wrong with it."""
        try:
            return self.pack(keys)
        except UserError as error:
            return error  # raised again by `load_batches`: the loader would add a traceback

    def pack(self, keys: list[Key]) -> Packed:
        """A batch with the objects of its images as targets."""
        images: list[Tensor] = []
        boxes: Arrays = []
        labels: Arrays = []
        for epoch, index in keys:
            record = self.dataset.records[index]
            transform = self.transform(epoch, index)
            objects = ~record.crowd  # a crowd region is no object to learn
            image, image_boxes, image_labels = transforms.apply(
                transform, self.read(index), record.boxes_xyxy[objects], record.labels[objects]
            )
            images.append(image)
            boxes.append(image_boxes.numpy())
            labels.append(image_labels.numpy())
        return Packed(
            pad_images(images).numpy(),
            [(image.shape[1], image.shape[2]) for image in images],
            boxes,
            labels,
            [self.dataset.records[index].image_id for _, index in keys],
        )

    def read(self, index: int) -> Tensor:
        """The image as it is stored."""
        return self.dataset.read(index)

    def transform(self, epoch: int, index: int) -> transforms.Transform:
        """What happens to an image and its boxes."""
        raise NotImplementedError


class _TrainSamples(Samples):
    def __init__(self, dataset: DetectionDataset, recipe: Recipe) -> None:
        super().__init__(dataset)
        self._recipe = recipe
        self._decoded: Sequence[Tensor] | None = None
        if _fits_in_memory(dataset, recipe):
            with ThreadPoolExecutor(4) as pool:
                self._decoded = list(pool.map(dataset.read, range(len(dataset))))

    def read(self, index: int) -> Tensor:
        return self.dataset.read(index) if self._decoded is None else self._decoded[index]

    def transform(self, epoch: int, index: int) -> transforms.Transform:
        record = self.dataset.records[index]
        generator = transforms.sample_generator(self._recipe.seed, epoch, index)
        return transforms.draw(self._recipe, record.height, record.width, generator)


def _fits_in_memory(dataset: DetectionDataset, recipe: Recipe) -> bool:
    if recipe.cache != "auto":
        return recipe.cache == "memory"
    needed = sum(3 * record.height * record.width for record in dataset.records)
    return needed * recipe.devices <= AUTO_CACHE_BYTES  # each process holds its own


def load_batches(
    samples: Samples, keys: Iterable[list[Key]], recipe: Recipe
) -> Generator[Batch, None, None]:
    """The batches of lists of keys, prepared by the recipe's workers, at most one a core."""
    workers = min(recipe.workers, _cores())
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=keys,
        collate_fn=_identity,
        num_workers=workers,
        worker_init_fn=_start_worker,
        multiprocessing_context=_FORK if workers else None,
        pin_memory=recipe.accelerator != "cpu" and torch.cuda.is_available(),
        # Its own generator: the default would draw from the global one and shift the run's.
        generator=torch.Generator(),
    )
    for packed in loader:
        if isinstance(packed, UserError):
            raise packed
        yield packed if isinstance(packed, Batch) else packed.batch()


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _identity(packed: Any) -> Any:
    return packed


def _start_worker(worker: int) -> None:
    """Workers are the parallelism; how a program ends is the main process's to handle."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_after_parent)
    # The loader's own watch is not enough: a worker that writes a batch into a pipe that nobody
    # reads any more would wait for ever.
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None:
        end_with_parent(parent.pid)


def _end_after_parent(*_: Any) -> None:
    """Where all processes are told to end together, a worker that goes first looks like a fault.

    It replaces torch's own handler, by which a worker that its parent gives up ends at once.
    """
    time.sleep(2.0)
    os._exit(0)


def end_with_parent(parent: int) -> None:
    """From now on, ends this process when its parent has ended, however that came."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(2)

    threading.Thread(target=watch, daemon=True).start()
