import json
from pathlib import Path

import numpy as np
import pytest
import torch

from detdistill.data import generate_dataset, open_dataset, shapes, synthetic
from detdistill.errors import UserError
from detdistill.recipe import Recipe

COUNTS = {"train": 6, "val": 2, "test": 3}


def test_the_folder_is_a_coco_data_set(tmp_path):
    seen = []
    folder = generate_dataset(
        tmp_path / "set", seed=4, **COUNTS, size=96, progress=lambda *done: seen.append(done)
    )
    assert seen == [(i + 1, 11) for i in range(11)]
    ids: set[int] = set()
    for split, count in COUNTS.items():
        dataset = open_dataset(Recipe(data=str(folder), strict=True), split)
        assert len(dataset) == count and len(dataset.classes) == 10
        assert all((record.height, record.width) == (96, 96) for record in dataset.records)
        ids |= {record.image_id for record in dataset.records}
        assert dataset.read(0).float().std() > 1
        info = json.loads(dataset.source.read_text())["info"]
        assert (info["seed"], info["generator_version"]) == (4, synthetic.VERSION)
    assert len(ids) == 11
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_images_depend_on_seed_split_and_index_alone(tmp_path):
    short = generate_dataset(tmp_path / "short", **COUNTS, size=64)
    long = generate_dataset(tmp_path / "long", **(COUNTS | {"train": 8}), size=64)
    for split, count in COUNTS.items():
        one, other = (open_dataset(Recipe(data=str(f)), split) for f in (short, long))
        for index in range(count):
            assert torch.equal(one.read(index), other.read(index))
            assert torch.equal(one.records[index].boxes_xyxy, other.records[index].boxes_xyxy)
    keys = [(0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1)]
    images = {synthetic.draw_scene(*key, 64).image.tobytes() for key in keys}
    assert len(images) == len(keys)


def test_a_finished_folder_is_kept_and_a_foreign_one_refused(tmp_path):
    folder = generate_dataset(tmp_path / "set", **COUNTS, size=64)
    image = next((folder / "images").iterdir())
    image.write_bytes(b"touched")
    assert generate_dataset(folder, **COUNTS, size=64) == folder
    assert image.read_bytes() == b"touched"
    with pytest.raises(UserError, match=r"set: exists and holds something else"):
        generate_dataset(folder, **COUNTS, size=96)
    with pytest.raises(UserError, match=r"a\.txt: exists"):
        (tmp_path / "a.txt").write_text("x")
        generate_dataset(tmp_path / "a.txt")
    with pytest.raises(UserError, match="cannot write the data set"):
        generate_dataset(tmp_path / "a.txt" / "set")


def test_nothing_half_written_is_left(tmp_path):
    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_dataset(tmp_path / "set", **COUNTS, size=64, progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"train": 0}, {"size": 8}, {"seed": -1}])
def test_impossible_arguments(tmp_path, wrong):
    with pytest.raises(UserError, match="generated data"):
        generate_dataset(tmp_path / "set", **wrong)


@pytest.mark.parametrize("name", list(shapes.CLASSES))
def test_boxes_fit_the_drawn_pixels(name):
    areas = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        longest = float(rng.uniform(8, 100))
        shape = shapes.pose(shapes.CLASSES[name](rng), longest, rng)
        low, high = shape.outer.min(0), shape.outer.max(0)
        assert (high - low).max() == pytest.approx(longest, rel=1e-3)
        mask = shapes.rasterize(shape)
        rows, columns = np.nonzero(mask.coverage > 0)
        drawn_low = np.array([columns.min() + mask.left, rows.min() + mask.top])
        drawn_high = np.array([columns.max() + 1 + mask.left, rows.max() + 1 + mask.top])
        assert np.abs(drawn_low - low).max() <= 1.3 and np.abs(drawn_high - high).max() <= 1.3
        areas.add(round(float(mask.coverage.sum() / np.prod(high - low)), 3))
    assert len(areas) > 5  # the class varies in form, not only in size


def test_scenes_hold_what_they_promise():
    scenes = [synthetic.draw_scene(0, "train", index) for index in range(60)]
    boxes = np.array([box for scene in scenes for box in scene.boxes_xyxy])
    sides = boxes[:, 2:] - boxes[:, :2]
    assert boxes.min() >= 0 and boxes.max() <= 192
    assert sides.max(1).min() < 14 and sides.max() > 85 and sides.max() <= 100.01
    labels = [label for scene in scenes for label in scene.labels]
    assert set(labels) == set(range(len(shapes.CLASSES)))
    assert 7 < len(labels) / len(scenes) < 11


def test_covered_objects_stay_visible():
    rng = np.random.default_rng(0)
    objects = synthetic._Objects(96)
    for _ in range(60):
        objects.place(rng)
    assert len(objects.labels) > 8
    for number, pixels in enumerate(objects._pixels):
        seen = int((objects._owner == number).sum())
        assert seen >= synthetic.MIN_VISIBLE * pixels


PINNED = json.loads(Path(__file__).with_name("scenes_of_seed_0.json").read_text())


@pytest.mark.parametrize("pinned", PINNED["scenes"], ids=lambda scene: scene["split"])
def test_a_version_draws_the_same_scenes_for_ever(pinned):
    """Whoever changes the scenes raises `VERSION` and draws the file anew: results depend on it."""
    assert synthetic.VERSION == PINNED["version"]
    scene = synthetic.draw_scene(0, pinned["split"], pinned["index"])
    assert scene.labels == pinned["labels"]
    np.testing.assert_allclose(scene.boxes_xyxy, pinned["boxes_xyxy"], rtol=0, atol=1e-3)
    blocks = np.asarray(scene.image).reshape(8, 24, 8, 24, 3).mean((1, 3, 4))
    np.testing.assert_allclose(blocks, pinned["block_means"], rtol=0, atol=0.2)
