"""Contrast of the boxes of a step with each other and with those of the steps before."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detdistill.boxes import pairwise_iou
from detdistill.distill.adapters import EPSILON
from detdistill.distill.method import Step
from detdistill.distill.projectors import student_vectors
from detdistill.structures import Proposals

SAME_OBJECT = 0.5  # IoU of two boxes above which they are not told apart


class Contrast(nn.Module):
    """Draws each box's vector to the teacher's of the same box, away from those of others.

    Args:
        projector: from a dense student's cells, or the last shared layer of a two-stage one.
        memory: of the teacher's vectors.
        temperature: divides the cosines.
        positive: whether the denominator holds the pair of one box itself.
    """

    def __init__(
        self, projector: nn.Module, memory: VectorMemory, temperature: float, *, positive: bool
    ) -> None:
        """Only the projector learns."""
        super().__init__()
        self.projector, self.memory = projector, memory
        self.temperature, self.positive = temperature, positive

    def forward(self, step: Step, rois: Proposals, wanted: Tensor) -> Tensor:
        """The mean over the boxes; `wanted` (R, C) are the teacher's vectors of them."""
        # In float32: a temperature of 0.07 multiplies what half precision rounds away.
        with torch.autocast(wanted.device.type, enabled=False):
            found, _ = student_vectors(self.projector, step, rois)
            return self.loss(found, wanted, rois.boxes_xyxy)

    def loss(self, found: Tensor, wanted: Tensor, boxes_xyxy: list[Tensor]) -> Tensor:
        """-log of s_jj over the sum of s_ij, mean over the boxes j (todd's `CKDLoss`).

        Here 0 of a box that there is nothing to contrast with.

        Args:
            found: (R, C) of the student.
            wanted: (R, C) of the teacher, on the same boxes.
            boxes_xyxy: (R_i, 4) of each image.
        """
        found = F.normalize(found, dim=1, eps=EPSILON) / self.temperature
        wanted = F.normalize(wanted.float(), dim=1, eps=EPSILON)
        [newest, *past], first = self.memory(wanted)
        if not len(found):
            return found.sum()
        overlaps = [pairwise_iou(boxes, boxes) > SAME_OBJECT for boxes in boxes_xyxy]
        struck: Tensor = torch.block_diag(*overlaps)  # type: ignore[no-untyped-call]
        struck.fill_diagonal_(True)
        left = len(newest) - struck.sum(1) + sum(map(len, past))
        struck.fill_diagonal_(not self.positive)  # todd strikes it out: a box overlaps itself
        struck = F.pad(struck, (first, len(newest) - len(found) - first))
        # Not -inf, whose gradient is none where all of a row is struck.
        present = (found @ newest.T).masked_fill(struck, torch.finfo(found.dtype).min)
        # Step by step, and once more for the gradient: the matrix of all is large.
        parts = [
            checkpoint(similarity_to_all, found, vectors, use_reentrant=False)
            for vectors in past
            if len(vectors)
        ]
        others = torch.stack([present.logsumexp(1), *parts], 1).logsumexp(1)
        losses = others - (found * wanted).sum(1)
        return torch.where(left > 0, losses, 0.0).sum() / len(found)


def similarity_to_all(found: Tensor, vectors: Tensor) -> Tensor:
    """(R,): the logarithm of the summed similarities of each of `found` (R, C) to (M, C)."""
    return (found @ vectors.T).logsumexp(1)


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
        """Adds the vectors (R, C) of this process.

        They are kept, and those of other processes waited for, in training alone, so that a look at
        the loss from outside changes nothing.

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
