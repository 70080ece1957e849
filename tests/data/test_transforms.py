import pytest
import torch

from detdistill.boxes import keep_ratio_size
from detdistill.data import transforms
from detdistill.data.transforms import Crop, Transform
from detdistill.recipe import Recipe

BOX = [30.0, 12.0, 70.0, 42.0]


def drawn(height: int = 60, width: int = 100) -> torch.Tensor:
    """A bright rectangle at BOX on black."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 12:42, 30:70] = 250
    return image


def found(image: torch.Tensor) -> torch.Tensor:
    """Box around the bright pixels."""
    rows, columns = (image[0] > 125).nonzero(as_tuple=True)
    corners = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    return torch.stack(corners).float()


def applied(transform: Transform, boxes=(BOX,)):
    return transforms.apply(transform, drawn(), torch.tensor(boxes), torch.arange(len(boxes)) + 3)


@pytest.mark.parametrize(
    "transform",
    [
        Transform(60, 100),
        Transform(60, 100, flip=True),
        Transform(90, 150),
        Transform(30, 50, flip=True),
        Transform(60, 100, Crop(5, 20, 50, 60)),
        Transform(60, 100, Crop(20, 40, 40, 60)),
        Transform(120, 200, Crop(30, 80, 64, 96), flip=True),
        Transform(120, 200, Crop(0, 0, 60, 100), flip=True),
    ],
)
def test_boxes_follow_the_pixels(transform):
    image, boxes, labels = applied(transform)
    assert image.dtype == torch.uint8
    expected = (transform.height, transform.width)
    if transform.crop:
        expected = (transform.crop.height, transform.crop.width)
    assert image.shape[1:] == expected
    assert labels.tolist() == [3]
    assert (boxes[0] - found(image)).abs().max() <= 0.5


@pytest.mark.parametrize("seed", range(12))
def test_drawn_transforms_keep_boxes_on_their_pixels(seed):
    recipe = Recipe(
        resize_short=[40, 90],
        resize_long=150,
        resize_mode="range",
        scale_jitter=[0.7, 1.6],
        crop=True,
        color_jitter=0.2,
    )
    generator = transforms.sample_generator(0, 0, seed)
    transform = transforms.draw(recipe, 60, 100, generator)
    image, boxes, _ = applied(transform)
    bright = (image[0] > 125).any()
    assert len(boxes) == int(bright)
    if bright:
        assert (boxes[0] - found(image)).abs().max() <= 1


def test_crop_drops_what_is_nearly_gone():
    boxes = torch.tensor(
        [
            [0.0, 0, 10, 10],  # inside, touches the border
            [0.0, 0, 50, 10],  # 40 % of it left
            [15.0, 15, 100, 100],  # far less than a tenth left
            [19.5, 5, 22, 8],  # less than a pixel left
            [30.0, 30, 40, 40],  # gone
            [3.0, 3, 3.5, 3.5],  # was small before
        ]
    )
    clipped, kept = transforms.crop_boxes(boxes, Crop(0, 0, 20, 20))
    assert kept.tolist() == [True, True, False, False, False, True]
    assert clipped[1].tolist() == [0, 0, 20, 10]


@pytest.mark.parametrize(
    ("height", "width", "short", "long", "expected"),
    [
        (60, 100, 30, 1000, (30, 50)),
        (60, 100, 30, 40, (24, 40)),
        (100, 60, 30, 40, (40, 24)),
        (60, 100, 600, 40, (24, 40)),
        (1, 5000, 320, 544, (1, 544)),
        (427, 640, 800, 1333, (800, 1199)),  # MMDetection's size of a usual COCO image
    ],
)
def test_sizes_keep_the_ratio(height, width, short, long, expected):
    assert keep_ratio_size((height, width), short, long) == expected


def many(recipe: Recipe, height: int = 100, width: int = 100) -> list[Transform]:
    return [
        transforms.draw(recipe, height, width, transforms.sample_generator(0, 1, index))
        for index in range(200)
    ]


def test_choice_and_range_of_sizes():
    choice = many(Recipe(resize_short=[40, 90], flip=0.0))
    assert {transform.height for transform in choice} == {40, 90}
    inside = many(Recipe(resize_short=[40, 90], resize_mode="range", flip=1.0))
    heights = {transform.height for transform in inside}
    assert min(heights) >= 40 and max(heights) <= 90 and len(heights) > 30
    assert not any(transform.flip for transform in choice)
    assert all(transform.flip for transform in inside)
    assert transforms.eval_size(Recipe(resize_short=[40, 90])) == (90, 544)


@pytest.mark.parametrize(("height", "width"), [(60, 100), (100, 60)])
def test_jitter_and_crop_stay_in_the_window(height, width):
    recipe = Recipe(resize_short=[50], resize_long=80, scale_jitter=[0.5, 2.0], crop=True)
    drawn = many(recipe, height, width)
    assert min(t.height for t in drawn) < 42 and max(t.height for t in drawn) > 90
    window = (50, 80) if width > height else (80, 50)
    for transform in drawn:
        crop = transform.crop
        assert crop.height <= window[0] and crop.width <= window[1]
        assert 0 <= crop.top <= transform.height - crop.height
        assert 0 <= crop.left <= transform.width - crop.width
    assert len({transform.crop.left for transform in drawn}) > 10


def test_color_changes_pixels_and_no_box():
    recipe = Recipe(resize_short=[60], resize_long=100, flip=0.0, color_jitter=0.5)
    transform = transforms.draw(recipe, 60, 100, transforms.sample_generator(0, 0, 0))
    image, boxes, _ = applied(transform)
    assert boxes.tolist() == [BOX]
    assert image.dtype == torch.uint8 and not torch.equal(image, drawn())


def test_generators_depend_on_each_part_of_the_key():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 11), (0, 1, 1), (0, 0, -1)]
    draws = {float(torch.rand((), generator=transforms.sample_generator(*key))) for key in keys}
    assert len(draws) == len(keys)
    again = torch.rand((), generator=transforms.sample_generator(0, 0, 0))
    assert float(again) in draws
