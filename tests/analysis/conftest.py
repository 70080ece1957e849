from dataclasses import replace

import pytest

from detdistill.analysis.pair import Pair, Sample
from detdistill.data import generate_dataset, open_dataset
from detdistill.recipe import Recipe
from tests.helpers import make_batch, narrow


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis") / "shapes"
    generate_dataset(folder, train=1, val=6, test=1, size=64)
    return Recipe(data=str(folder), resize_short=[64], resize_long=64, workers=0)


@pytest.fixture(scope="session")
def dataset(recipe):
    return open_dataset(recipe, "val")


@pytest.fixture
def make_pair():
    """Two narrow models by name; seeds tell equal ones apart."""

    def make(teacher="gfl_r18", student="gfl_r18", seeds=(1, 2), num_classes=10, **options):
        return Pair(
            narrow(teacher, num_classes, seeds[0]),
            narrow(student, num_classes, seeds[1], **options),
        )

    return make


@pytest.fixture
def look():
    """A pair's views of one random image of 72x95 pixels with `count` objects."""

    def look(pair, count=3, index=0):
        batch = make_batch((count,), (96, 128), pair.student.num_classes, seed=index)
        batch = replace(batch, images=batch.images[..., :96])  # padded as the loader does
        height, width = batch.sizes[0]
        teacher, student = pair.look(batch)
        targets = batch.padded_targets()
        areas = (targets.boxes[0, :count, 2:] - targets.boxes[0, :count, :2]).prod(1)
        image = batch.images[0, :, :height, :width]
        return Sample(index, image, targets, areas, teacher, student)

    return look
