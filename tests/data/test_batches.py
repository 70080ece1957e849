import itertools
import math
import subprocess
import sys
import time
from collections import Counter

import pytest
import torch

from detdistill.data import make_eval_batches, make_train_batches, open_dataset
from detdistill.data.dataset import DetectionDataset
from detdistill.errors import UserError
from detdistill.recipe import Recipe
from detdistill.structures import Batch
from tests.helpers import is_alive

BASE = {
    "resize_short": [32, 48],
    "resize_long": 64,
    "batch_size": 4,
    "color_jitter": 0.3,
    "scale_jitter": [0.8, 1.25],
    "crop": True,
    "workers": 0,
    "accelerator": "cpu",
}


@pytest.fixture
def data(write_folder) -> str:
    """Eleven images: seven wide, four tall; the first has no box, the second only a crowd."""
    sizes = [(30, 40), (30, 40), (40, 30)] * 3 + [(30, 60), (60, 30)]
    images = [
        {"id": 100 + i, "file_name": f"{i}.png", "height": h, "width": w}
        for i, (h, w) in enumerate(sizes)
    ]
    annotations = [
        {
            "id": i,
            "image_id": 100 + i,
            "category_id": 1,
            "bbox": [2, 3, 20, 15],
            "iscrowd": int(i == 1),
        }
        for i in range(1, 11)
    ]
    categories = [{"id": 1, "name": "thing"}]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    write_folder(coco)
    return str(write_folder(coco, "val"))


def train_set(data: str, **options) -> tuple[DetectionDataset, Recipe]:
    recipe = Recipe(data=data, **(BASE | options))
    return open_dataset(recipe, "train"), recipe


def take(batches, first_step: int, count: int) -> list[Batch]:
    iterator = batches.batches(first_step)
    taken = list(itertools.islice(iterator, count))
    iterator.close()
    return taken


def same(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images, other.images)
        and list(one.sizes) == list(other.sizes)
        and list(one.image_ids) == list(other.image_ids)
        and all(
            torch.equal(a[key], b[key])
            for a, b in zip(one.targets, other.targets, strict=True)
            for key in ("boxes", "labels")
        )
    )


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_depend_on_the_step_alone(data, workers, cache):
    reference = take(make_train_batches(*train_set(data)), 0, 8)
    batches = make_train_batches(*train_set(data, workers=workers, cache=cache))
    resumed = [*take(batches, 2, 2), *take(batches, 5, 3)]
    for one, other in zip(resumed, [*reference[2:4], *reference[5:8]], strict=True):
        assert same(one, other)
    assert not same(reference[0], reference[3])  # the same step of another epoch


def test_batches_are_ready_for_a_detector(data):
    batches = make_train_batches(*train_set(data))
    assert len(batches) == batches.steps_per_epoch == 3
    for batch in take(batches, 0, 6):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape[0] == 4 and batch.images.shape[2] % 32 == 0
        for image, (height, width), target in zip(
            batch.images, batch.sizes, batch.targets, strict=True
        ):
            assert image[:, height:].sum() == 0 and image[:, :, width:].sum() == 0
            assert image[:, :height, :width].sum() > 0
            assert target["labels"].dtype == torch.int64
            limits = torch.tensor([width, height, width, height])
            assert (target["boxes"] <= limits).all() and (target["boxes"] >= 0).all()


def test_every_image_once_an_epoch_and_constant_sizes(data):
    dataset, recipe = train_set(data)
    batches = make_train_batches(dataset, recipe)
    for epoch in (0, 1):
        steps = range(epoch * 3, epoch * 3 + 3)
        keys = [batches.keys(step) for step in steps]
        assert [len(part) for part in keys] == [4, 4, 4]
        assert {key[0] for part in keys for key in part} == {epoch}
        counts = Counter(index for part in keys for _, index in part)
        assert set(counts) == set(range(11)) and sum(counts.values()) == 12
    orders = [[batches.keys(step) for step in range(3 * epoch, 3 * epoch + 3)] for epoch in (0, 1)]
    assert [[i for _, i in part] for part in orders[0]] != [[i for _, i in p] for p in orders[1]]


def test_images_without_a_box_to_learn_are_left_out_of_training_alone(data):
    whole, _ = train_set(data)
    dataset, recipe = train_set(data, drop_empty=True)
    assert [record.image_id for record in whole.records] == list(range(100, 111))
    assert [record.image_id for record in dataset.records] == list(range(102, 111))
    assert len(dataset.stated_xywh) == 9  # the crowd's box has gone with its image
    batches = make_train_batches(dataset, recipe)
    assert len(batches) == 3
    seen = {image for batch in take(batches, 0, 3) for image in batch.image_ids}
    assert seen == set(range(102, 111))
    assert len(open_dataset(recipe, "val")) == 11


def test_the_seed_changes_order_and_pixels(data):
    one, other = (take(make_train_batches(*train_set(data, seed=seed)), 0, 1) for seed in (0, 1))
    assert not same(one[0], other[0])


def test_aspect_grouping(data):
    dataset, recipe = train_set(data)
    wide = [record.width >= record.height for record in dataset.records]

    def mixed(recipe: Recipe) -> int:
        batches = make_train_batches(dataset, recipe)
        kinds = [{wide[i] for _, i in batches.keys(step)} for step in range(60)]
        return sum(len(kind) == 2 for kind in kinds)

    # 7 wide, 4 tall, 4 a batch: one batch of each kind, the rest together with the filling.
    assert mixed(recipe) <= 20
    assert mixed(recipe.model_copy(update={"group_by_aspect": False})) > 40


def test_a_batch_larger_than_the_set(data):
    (batch,) = take(make_train_batches(*train_set(data, batch_size=30)), 0, 1)
    counts = Counter(batch.image_ids)
    assert len(counts) == 11 and sum(counts.values()) == 30 and max(counts.values()) == 3


def test_slices_of_two_processes_are_the_batch_of_one(data):
    dataset, recipe = train_set(data, devices=2)
    whole = take(make_train_batches(dataset, recipe), 1, 4)
    parts = [
        take(make_train_batches(dataset, recipe, rank=rank, world_size=2), 1, 4) for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert len(first.sizes) == len(second.sizes) == 2
        assert [*first.image_ids, *second.image_ids] == list(batch.image_ids)
        sizes = [*first.sizes, *second.sizes]
        assert sizes == list(batch.sizes)
        images = [*first.images, *second.images]
        targets = [*first.targets, *second.targets]
        for i, (height, width) in enumerate(sizes):
            assert torch.equal(images[i][:, :height, :width], batch.images[i, :, :height, :width])
            assert torch.equal(targets[i]["boxes"], batch.targets[i]["boxes"])


def test_accumulation_parts_the_same_batches(data):
    whole, parts = (make_train_batches(*train_set(data, accumulate=n)) for n in (1, 4))
    assert len(whole) == len(parts) == 3
    for step in (0, 2, 3):
        [batch] = take(whole, step, 1)
        pieces = take(parts, step, 4)
        assert [len(piece.sizes) for piece in pieces] == [1] * 4
        assert [number for piece in pieces for number in piece.image_ids] == batch.image_ids
    dataset, recipe = train_set(data)
    with pytest.raises(UserError, match="batch_size 4 cannot be shared by 3"):
        make_train_batches(dataset, recipe, world_size=3)


def test_empty_images_stay_and_crowds_are_no_targets(data):
    plain = {"scale_jitter": None, "crop": False}
    batches = take(make_train_batches(*train_set(data, **plain)), 0, 3)
    counts = {
        number: len(target["boxes"])
        for batch in batches
        for number, target in zip(batch.image_ids, batch.targets, strict=True)
    }
    assert counts == {100: 0, 101: 0} | {100 + i: 1 for i in range(2, 11)}


def test_the_global_generator_is_left_alone(data):
    batches = make_train_batches(*train_set(data, workers=2))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    take(batches, 0, 2)
    assert torch.equal(torch.rand(3), expected)


def test_the_cache_is_filled_once_and_only_if_it_fits(data, monkeypatch):
    dataset, recipe = train_set(data, cache="auto")
    reads = Counter()
    read = DetectionDataset.read

    def counted(self, index):
        reads[index] += 1
        return read(self, index)

    monkeypatch.setattr(DetectionDataset, "read", counted)
    take(make_train_batches(dataset, recipe), 0, 9)
    assert set(reads.values()) == {1} and len(reads) == 11
    reads.clear()
    monkeypatch.setattr("detdistill.data.loader.AUTO_CACHE_BYTES", 1000)
    take(make_train_batches(dataset, recipe), 0, 9)
    assert sum(reads.values()) == 36


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_one_sentence_from_any_process(data, tmp_path, workers):
    dataset, recipe = train_set(data, workers=workers, cache="none")
    path = tmp_path / "images" / "3.png"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError) as caught:
        take(make_train_batches(dataset, recipe), 0, 3)
    assert str(caught.value).startswith(f"{path}: the image is damaged")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"3.png: the image is damaged"):
        make_train_batches(dataset, recipe.model_copy(update={"cache": "memory"}))


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_sees_every_image_once(data, workers):
    recipe = Recipe(data=data, **(BASE | {"workers": workers, "eval_batch": 3}))
    dataset = open_dataset(recipe, "val")
    batches = make_eval_batches(dataset, recipe)
    seen: list[int] = []
    for batch, indices in batches:
        assert list(batch.image_ids) == [dataset.records[i].image_id for i in indices]
        rows = zip(batch.sizes, indices, batch.targets, strict=True)
        for (height, width), index, target in rows:
            record = dataset.records[index]
            assert torch.equal(target["labels"], record.labels[~record.crowd])
            factors = torch.tensor([width / record.width, height / record.height] * 2)
            assert torch.allclose(target["boxes"], record.boxes_xyxy[~record.crowd] * factors)
            scale = min(
                48 / min(record.height, record.width), 64 / max(record.height, record.width)
            )
            assert abs(height - record.height * scale) <= 0.5
            assert abs(width - record.width * scale) <= 0.5
        seen += indices
    assert sorted(seen) == list(range(11))
    assert len(batches) == math.ceil(11 / 3)


def test_eval_batches_are_plain_resized_images(data):
    recipe = Recipe(data=data, **(BASE | {"resize_short": [30], "resize_long": 60}))
    dataset = open_dataset(recipe, "val")
    for batch, indices in make_eval_batches(dataset, recipe):
        for image, (height, width), index in zip(batch.images, batch.sizes, indices, strict=True):
            assert torch.equal(image[:, :height, :width], dataset.read(index))


@pytest.mark.parametrize(
    ("most", "chosen"), [(1, [0]), (3, [0, 3, 7]), (11, range(11)), (99, range(11))]
)
def test_a_part_of_the_images_is_spread_over_the_split(data, most, chosen):
    recipe = Recipe(data=data, **(BASE | {"workers": 0, "eval_batch": 2}))
    batches = make_eval_batches(open_dataset(recipe, "val"), recipe, most=most)
    assert sorted(i for _, indices in batches for i in indices) == list(chosen)


SCRIPT = """
import multiprocessing, sys, time
from detdistill.data import make_train_batches, open_dataset
from detdistill.recipe import Recipe
multiprocessing.set_start_method("forkserver")  # the default of later Pythons
recipe = Recipe(data=sys.argv[1], workers=2, batch_size=64, resize_short=[256], accelerator="cpu")
batches = make_train_batches(open_dataset(recipe, "train"), recipe).batches(0)
next(batches)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


def test_workers_end_with_a_killed_run(data):
    command = [sys.executable, "-c", SCRIPT, data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        workers = run.stdout.readline().split()
        run.kill()
    assert workers
    # The batches of 12 MB fill the pipe, so the workers are in the middle of writing one.
    for _ in range(100):
        alive = [pid for pid in workers if is_alive(pid)]
        if not alive:
            break
        time.sleep(0.1)
    assert alive == []
