"""A study without training: folders as the engine leaves them, detectors that blur the truth."""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from detdistill.engine.train import RunResult
from detdistill.errors import DivergedError
from detdistill.recipe import Recipe, dump_recipe
from detdistill.structures import Detections

CLASSES = ["disc", "bar", "ring"]
TINY = {"base_channels": 8, "fpn_channels": 16, "tower_channels": 16, "tower_depth": 1}
TERMS = {"plain": ["task/cls", "task/box"], "taught": ["crosskd/cls", "crosskd/box"]}


def write_folder(folder, counts=(2, 2, 8), size=96, seed=0):
    """A COCO folder with rectangles and discs."""
    draw_random = random.Random(seed)
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(CLASSES)]
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        images, annotations = [], []
        for number in range(count):
            name = f"{split}_{number:03d}.png"
            picture = Image.new("RGB", (size, size), tuple(draw_random.choices(range(60), k=3)))
            images.append({"id": number + 1, "file_name": name, "height": size, "width": size})
            for _ in range(draw_random.randint(1, 4)):
                box = _draw_object(picture, draw_random, size)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number + 1,
                        "category_id": 10 * (1 + box[0]),
                        "bbox": box[1],
                        "area": box[1][2] * box[1][3],
                        "iscrowd": 0,
                    }
                )
            picture.save(folder / "images" / name)
        data = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"{split}.json").write_text(json.dumps(data))
    return folder


def _draw_object(picture, draw_random, size):
    label = draw_random.randrange(3)
    width, height = draw_random.randint(size // 8, size // 3), draw_random.randint(8, size // 3)
    x, y = draw_random.randint(0, size - width), draw_random.randint(0, size - height)
    colour = tuple(draw_random.choices(range(120, 256), k=3))
    shape = ImageDraw.Draw(picture)
    corners = (x, y, x + width - 1, y + height - 1)
    if label == 1:
        shape.rectangle(corners, fill=colour)
    else:
        shape.ellipse(corners, fill=colour if label == 0 else None, outline=colour, width=4)
    return label, [x, y, width, height]


class Blurred(nn.Module):
    """Answers with the truth of the test split, moved and missed the more the lower its skill."""

    name = "blurred"
    num_classes = len(CLASSES)
    input_size = None

    def __init__(self, skill, seed, dataset):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000 + int(1000 * skill)))
        self.classes = list(dataset.classes)
        self.skill, self.seed = skill, seed
        self.records = {self.key(dataset.read(i)): r for i, r in enumerate(dataset.records)}

    @staticmethod
    def key(image):
        return hash(image[:, : image.shape[1] // 32 * 32].numpy().tobytes())

    def forward(self, batch):
        sizes = batch.sizes
        return [self.key(im[:, :h, :w]) for im, (h, w) in zip(batch.images, sizes, strict=True)]

    def detect(self, output, sizes):
        return [self.answer(self.records[key]) for key in output]

    def predict(self, images):
        return [Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0).long())]

    def answer(self, record):
        noise = np.random.default_rng([self.seed, record.image_id])
        count = len(record.labels)
        sizes = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2]).numpy()
        shift = noise.normal(0, 0.25 * (1 - self.skill), (count, 4)) * np.tile(sizes, 2)
        keep = torch.from_numpy(noise.random(count) < 0.4 + 0.6 * self.skill)
        boxes = (record.boxes_xyxy + torch.from_numpy(shift).float()).clamp(min=0)
        boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        scores = torch.from_numpy(noise.uniform(0.35, 0.95, count)).float()
        return Detections(boxes[keep], scores[keep], record.labels[keep])


class World:
    """Replaces training and loading; counts what is asked of it.

    `skills` maps an arm ("teacher", "student", "crosskd", ...) to 0..1; `seconds` and
    `processor_seconds` to the times that a run claims to have taken. Runs that try a learning rate
    are the better the nearer it is to `best_lr`; from `too_high` on all diverge.
    """

    def __init__(self, dataset, skills=None, seconds=None, eval_aps=None):
        self.dataset = dataset
        self.skills = {"teacher": 0.9, "student": 0.5, "crosskd": 0.7, "pkd": 0.62, "tf_head": 0.6}
        self.skills |= {"student_same_time": 0.53} | (skills or {})
        self.seconds = {"teacher": 200, "student": 100, "crosskd": 150, "pkd": 125, "tf_head": 130}
        self.seconds |= {"rates": 100, "student_same_time": 150} | (seconds or {})
        self.processor_seconds: dict[str, float] = {}
        self.eval_aps = eval_aps
        self.trained: list[str] = []
        self.loaded: list[str] = []
        self.die_at: str | None = None
        self.best_lr, self.too_high = 0.01, math.inf

    def train(self, recipe: Recipe, out: Path, *, resume: bool = False) -> RunResult:
        arm = self.arm(out)
        self.trained.append(f"{arm}/{out.name}")
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(dump_recipe(recipe))
        if self.die_at == f"{arm}/{out.name}":
            raise KeyboardInterrupt
        if recipe.lr >= self.too_high:
            raise DivergedError(f"{out.name}: diverged")
        steps = 20 * recipe.epochs
        self.write_log(recipe, out, arm, steps)
        skill = self.skill(recipe, arm) + 0.01 * math.sin(7 * recipe.seed)
        facts = {"skill": skill, "seed": recipe.seed, "arm": arm}
        (out / "model.safetensors").write_text(json.dumps(facts))
        (out / "model.json").write_text("{}")
        status = {"done": True, "seconds": self.seconds[arm], "steps": steps, "best_ap": 0.5}
        status["processor_seconds"] = self.processor_seconds.get(arm)
        (out / "run.json").write_text(json.dumps(status))
        return RunResult(out, self.seconds[arm], steps, 0.5)

    @staticmethod
    def arm(folder):
        return "teacher" if folder.name == "teacher" else folder.parent.name

    def skill(self, recipe, arm):
        if arm != "rates":
            return self.skills[arm]
        return self.skills["student"] - 0.05 * abs(math.log2(recipe.lr / self.best_lr))

    def write_log(self, recipe, out, arm, steps):
        noise = random.Random(f"{arm}{recipe.seed}")
        terms = TERMS["plain"] + (TERMS["taught"] if recipe.methods else [])
        with (out / "metrics.jsonl").open("w") as log:
            for step in range(1, steps + 1):
                base = {"step": step, "epoch": step / 20}
                values = {
                    t: (k + 1) * (0.2 + math.exp(-4 * step / steps) + noise.uniform(-0.1, 0.1))
                    for k, t in enumerate(terms)
                }
                if step % 2 == 0:
                    line = {"lr": 0.1, "loss": sum(values.values()), "raw": values}
                    log.write(
                        json.dumps({"kind": "step", **base, **line, "weighted": values}) + "\n"
                    )
                if step % 20 == 0:
                    ap = self.skill(recipe, arm) * (1 - math.exp(-9 * step / steps))
                    ap += noise.uniform(0, 0.004)
                    if self.eval_aps:
                        ap = self.eval_aps[step * len(self.eval_aps) // (steps + 1)]
                    line = {"split": "val", "metrics": {"AP": ap}, "per_class": {}}
                    log.write(json.dumps({"kind": "eval", **base, **line}) + "\n")

    def load(self, folder):
        facts = json.loads((Path(folder) / "model.safetensors").read_text())
        self.loaded.append(f"{facts['arm']}/seed{facts['seed']}")
        return Blurred(facts["skill"], facts["seed"], self.dataset)

    def install(self, monkeypatch):
        """Puts the fakes where a study looks for training and for weights."""
        import detdistill.study.compare as compare
        import detdistill.study.runs as runs

        monkeypatch.setattr(runs, "train", self.train)
        monkeypatch.setattr(runs, "load_detector", self.load)
        monkeypatch.setattr(compare, "load_detector", self.load)
        monkeypatch.setattr(
            compare, "existing_teacher", lambda recipe, _: self.load(Path(recipe.teacher))
        )


def make_recipe(folder, **changes):
    values = {
        "student": "gfl_r18",
        "student_options": TINY,
        "teacher_options": TINY,
        "data": str(folder),
        "resize_short": [96],
        "resize_long": 96,
        "workers": 0,
        "epochs": 8,
        "accelerator": "cpu",
    }
    return Recipe(**(values | changes))


def score(seed, ap, folder="nowhere", **changes):
    """A `RunScore` that reached `ap` (0..100)."""
    from detdistill.evaluation.coco import NUMBERS
    from detdistill.study.runs import RunScore

    values = SimpleNamespace(per_class={"disc": ap / 100}, seconds=100.0, epochs=8)
    values.gain_interval = None
    for name, value in changes.items():
        setattr(values, name, value)
    numbers = {name: ap / 100 for name in NUMBERS}
    return RunScore(
        seed,
        Path(folder),
        numbers,
        values.per_class,
        "gfl_r18",
        1_240_000,
        values.seconds,
        values.epochs,
        values.gain_interval,
    )


def run_study(recipe, out, **changes):
    from detdistill.study.compare import compare

    settings = {"teacher": "gfl_r34", "methods": ["crosskd"], "seeds": [0, 1]}
    settings |= {"on_status": lambda line: None, **changes}
    return compare(recipe, out, **settings)
