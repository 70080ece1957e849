"""Vectors of past steps that later ones are contrasted with."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
from torch import Tensor, nn


class VectorMemory(nn.Module):
    """Vectors (R, C) of the last steps, of all processes, in the same order in each of them.

    A checkpoint holds it, so that a resumed run goes on with the same numbers. It is no buffer:
    its size is that of the batches, which is known late, and no process has to be sent it.

    Args:
        length: steps that are remembered, the present one included.
        width: C.
    """

    def __init__(self, length: int, width: int) -> None:
        """Empty."""
        super().__init__()
        self.length, self.width = length, width
        self.steps: deque[Tensor] = deque(maxlen=length)

    def get_extra_state(self) -> Tensor:
        """(M, 1 + C): how many steps ago, and the vector; one tensor, as safetensors wants it."""
        rows = [
            torch.cat((vectors.new_full((len(vectors), 1), age), vectors), 1)
            for age, vectors in enumerate(self.steps)
        ]
        return torch.cat(rows) if rows else torch.zeros(0, 1 + self.width)

    def set_extra_state(self, state: Tensor) -> None:
        """Undoes `get_extra_state`."""
        ages = state[:, 0]
        steps = int(ages.max()) + 1 if len(ages) else 0
        known = [state[ages == age, 1:] for age in range(min(steps, self.length))]
        self.steps = deque(known, self.length)

    def forward(self, own: Tensor) -> tuple[list[Tensor], int]:
        """Adds the vectors (R, C) of this process; in training alone they are kept.

        Returns:
            All vectors per step, the newest first, and the row of the newest at which `own` begins.
        """
        own = own.detach().float()
        past = [vectors.to(own.device) for vectors in self.steps]
        if not self.training:
            return [own, *past[: self.length - 1]], 0
        newest, first = rows_of_processes(own)
        self.steps = deque([newest, *past[: self.length - 1]], self.length)
        return list(self.steps), first


def rows_of_processes(own: Tensor) -> tuple[Tensor, int]:
    """Rows (R, C) of all processes, in their order, and the row at which this process's begin.

    Every process must call it, with as many rows as it likes.
    """
    if not dist.is_available() or not dist.is_initialized():
        return own, 0
    count = torch.tensor(len(own), device=own.device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    numbers = [int(number) for number in counts]
    padded = own.new_zeros(max(numbers), own.shape[1])
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(gathered, padded)
    rows = [part[:number] for part, number in zip(gathered, numbers, strict=True)]
    return torch.cat(rows), sum(numbers[: dist.get_rank()])
