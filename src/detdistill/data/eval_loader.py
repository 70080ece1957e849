"""Batches for evaluation: each image once, as it is but for its size."""

from __future__ import annotations

from collections.abc import Iterator

from detdistill.boxes import keep_ratio_size
from detdistill.data import transforms
from detdistill.data.dataset import DetectionDataset
from detdistill.data.loader import Samples, load_batches
from detdistill.recipe import Recipe
from detdistill.structures import Batch


def spread(count: int, most: int | None) -> list[int]:
    """At most so many of `count` places, evenly spread and ascending; None takes all."""
    kept = count if most is None else min(most, count)
    return [i * count // kept for i in range(kept)]


def spread_subset(dataset: DetectionDataset, most: int) -> DetectionDataset:
    """A split of at most so many of its images, evenly spread, with all that belongs to them."""
    return dataset.subset(spread(len(dataset), most))


class EvalBatches:
    """Each image once, without augmentation, images of like size together."""

    def __init__(self, dataset: DetectionDataset, recipe: Recipe, most: int | None) -> None:
        """See `make_eval_batches`."""
        self._recipe = recipe
        short, long = transforms.eval_size(recipe)
        sizes = [keep_ratio_size((r.height, r.width), short, long) for r in dataset.records]
        order = sorted(spread(len(sizes), most), key=lambda index: (sizes[index], index))
        step = recipe.eval_batch
        self._indices = [order[i : i + step] for i in range(0, len(order), step)]
        self._samples = _EvalSamples(dataset, sizes)

    def __len__(self) -> int:
        """The number of batches."""
        return len(self._indices)

    def __iter__(self) -> Iterator[tuple[Batch, list[int]]]:
        """Batches, each with the indices of its images in the data set."""
        keys = [[(0, index) for index in indices] for indices in self._indices]
        yield from zip(load_batches(self._samples, keys, self._recipe), self._indices, strict=True)


def make_eval_batches(
    dataset: DetectionDataset, recipe: Recipe, *, most: int | None = None
) -> EvalBatches:
    """Batches for evaluation, with the indices of their images in the data set.

    Args:
        dataset: any split.
        recipe: sizes, `eval_batch`, workers.
        most: at most so many images, evenly spread over the split; None takes all.
    """
    return EvalBatches(dataset, recipe, most)


class _EvalSamples(Samples):
    def __init__(self, dataset: DetectionDataset, sizes: list[tuple[int, int]]) -> None:
        super().__init__(dataset)
        self._sizes = sizes

    def transform(self, epoch: int, index: int) -> transforms.Transform:
        return transforms.Transform(*self._sizes[index])
