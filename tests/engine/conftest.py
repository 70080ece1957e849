"""A tiny data set and recipe for runs of seconds."""

import pytest

from detdistill.data import generate_dataset
from detdistill.recipe import Recipe


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return generate_dataset(
        tmp_path_factory.mktemp("data") / "shapes", train=12, val=4, test=4, size=64
    )


@pytest.fixture
def recipe(data):
    def make(**values):
        narrow = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16}
        settings = {
            "student": "gfl_r18",
            "student_options": narrow,
            "data": str(data),
            "resize_short": [64],
            "resize_long": 64,
            "batch_size": 4,
            "workers": 0,
            "epochs": 2,
            "warmup_steps": 2,
            "log_every": 1,
            "deterministic": True,
            "accelerator": "cpu",
        }
        return Recipe.model_validate({**settings, **values})

    return make
