"""What the benchmarks share: a batch of random boxes, and clocks that compare in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from detdistill import Batch


def make_batch(batch: int, size: int, classes: int, boxes: int) -> Batch:
    """Random square images of `size` pixels with `boxes` objects each; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, size, size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    targets = []
    for _ in range(batch):
        low = torch.rand(boxes, 2, generator=generator) * size * 0.6
        side = torch.rand(boxes, 2, generator=generator) * size * 0.35 + 16
        corners = torch.cat((low, low + side), 1).clamp(max=size)
        labels = torch.randint(0, classes, (boxes,), generator=generator)
        targets.append({"boxes": corners, "labels": labels})
    return Batch(images, [(size, size)] * batch, targets)


class Clock:
    """Seconds by name, of this process alone: what else the machine does counts little."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def now(self) -> float:
        return time.process_time()

    def run(self, name: str, function: Callable[[], Any]) -> Any:
        start = self.now()
        result = function()
        self.seconds.setdefault(name, []).append(self.now() - start)
        return result

    def watch(self, owner: object, method: str, name: str) -> None:
        """Adds up the time of every call of a method under `name`."""
        inner = getattr(owner, method)
        setattr(owner, method, lambda *a, **k: self.run(name, lambda: inner(*a, **k)))

    def milliseconds(self, name: str) -> float:
        return 1000 * median(self.seconds[name])


class DeviceClock(Clock):
    """Wall time, with the queue of a CUDA device emptied."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
