"""Recipes: the one flat YAML file that reproduces a run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from detdistill.errors import UserError
from detdistill.registry import nearest


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("Input should be a number, not true or false")
    return value


def _no_argument(options: dict[str, Any]) -> dict[str, Any]:
    for key in options.keys() & {"name", "num_classes", "path", "strict"}:
        raise ValueError(f"{key!r} is no option: the data and other settings say it; leave it out")
    return options


def _texts(class_map: Any) -> Any:
    for name in class_map if isinstance(class_map, dict) else ():
        if not isinstance(name, str):
            raise ValueError(f"YAML reads the class {name!r} as no text: put its name in quotes")
    return class_map


def _known_class(value: Any) -> Any:
    if isinstance(value, str) or (type(value) is int and value >= 0):
        return value
    raise ValueError(
        "expected what the teacher calls the class, or its label there, a whole number from 0 on; "
        "a class with a dot or = in its name stands in braces: --set 'class_map={\"v1.5\": NAME}'"
    )


# Texts are taken where they are numbers: YAML reads 1e-3 as a text.
Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Positive = Annotated[Whole, Field(ge=1)]
BatchSize = Annotated[Positive, Field(le=65536)]  # beyond it, lists of its images fill the memory
SMALLEST, LARGEST = 8, 16384  # sides of a resized image; 1x1 is more than torch can resize to
Pixels = Annotated[Whole, Field(ge=SMALLEST, le=LARGEST)]
Strength = Annotated[Number, Field(le=1e6)]  # beyond it, float32 overflows within a step
Fraction = Annotated[Number, Field(ge=0, le=1)]
Options = Annotated[dict[str, Any], AfterValidator(_no_argument)]
"""Keywords of a detector or a method, which come beside the arguments of the function called."""
KnownClass = Annotated[str | int, BeforeValidator(_known_class)]
"""What a teacher calls a class of the data, or its label there."""
ARM_NAME = r"[A-Za-z0-9_+-]+"  # a folder, too
OTHER_ARMS = ("teacher", "student", "student_same_time")
Place = tuple[str, ...]  # of a setting: ("student_options", "fpn_channels")


class Recipe(BaseModel):
    """Every setting of a run. Detector and method options are checked by what they configure."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    # models
    student: str = "retinanet_r18"
    student_options: Options = {}
    teacher: str | None = None
    teacher_options: Options = {}
    class_map: Annotated[
        dict[str, KnownClass], BeforeValidator(_texts)
    ] = {}  # of the data: the teacher's
    methods: dict[str, Options] = {}
    arms: dict[str, dict[str, Options]] = {}  # of `compare`: each a name for a set of methods

    # data: a COCO, YOLO or Pascal VOC folder, or explicit COCO files per split
    data: str | None = None
    train_images: str | None = None
    train_annotations: str | None = None
    val_images: str | None = None
    val_annotations: str | None = None
    test_images: str | None = None
    test_annotations: str | None = None
    strict: bool = False
    drop_empty: bool = False  # training images without a box to learn
    resize_short: list[Pixels] = Field([320], min_length=1)  # one size, a range or choices
    resize_long: Pixels = 544
    resize_mode: Literal["range", "choice"] = "choice"
    flip: Fraction = 0.5
    scale_jitter: Annotated[list[Number], Field(min_length=2, max_length=2)] | None = None
    crop: bool = False  # after scale jitter: to resize_short x resize_long
    color_jitter: Fraction = 0.0
    batch_size: BatchSize = 8  # over all processes
    workers: Annotated[Whole, Field(ge=0, le=512)] = 2
    cache: Literal["auto", "memory", "none"] = "auto"
    group_by_aspect: bool = True

    # optimisation
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[Strength, Field(gt=0)] = 0.02
    base_batch: Positive = 8  # lr is scaled by batch_size / base_batch
    momentum: Fraction = 0.9
    weight_decay: Annotated[Strength, Field(ge=0)] = 1e-4
    bias_lr_factor: Annotated[Strength, Field(gt=0)] = 1.0  # of lr; not where layers normalise
    bias_weight_decay: Annotated[Strength, Field(ge=0)] | None = None  # None: as weight_decay
    epochs: Positive = 24
    max_steps: Positive | None = None
    warmup: Literal["linear", "constant"] = "linear"
    warmup_steps: Annotated[Whole, Field(ge=0)] = 200
    warmup_start: Fraction = 0.001  # share of lr at step 0; constant: at all warmup_steps
    schedule: Literal["cosine", "step"] = "cosine"
    milestones: list[Positive] = []  # epochs at which the step schedule multiplies lr by 0.1
    clip_norm: Annotated[Number, Field(gt=0)] | None = 35.0
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False

    # the run
    seed: Annotated[Whole, Field(ge=0, lt=2**63)] = 0
    deterministic: bool = False
    devices: Positive = 1
    nodes: Positive = 1
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: Positive = 10
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    eval_every: Positive = 1  # epochs
    checkpoint_every: Positive = 100  # steps
    eval_batch: BatchSize = 8

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.schedule == "step" and not self.milestones:
            raise ValueError("schedule 'step' needs milestones, e.g. milestones: [8, 11]")
        if self.warmup == "constant" and not self.warmup_start:
            raise ValueError("warmup 'constant' needs a warmup_start above 0, e.g. 0.333")
        if self.batch_size % (self.devices * self.nodes * self.accumulate):
            raise ValueError(
                f"batch_size {self.batch_size} must be a multiple of devices x nodes x accumulate "
                f"= {self.devices * self.nodes * self.accumulate}"
            )
        if self.resize_mode == "range" and len(self.resize_short) != 2:
            raise ValueError("resize_mode 'range' needs two sizes, resize_short: [640, 800]")
        if self.scale_jitter is not None and not 0 < self.scale_jitter[0] <= self.scale_jitter[1]:
            raise ValueError("scale_jitter needs two factors, low then high, e.g. [0.5, 2.0]")
        low, high = self.scale_jitter or (1, 1)
        sides = (low * min(*self.resize_short, self.resize_long), high * self.resize_long)
        if sides[0] < SMALLEST or sides[1] > LARGEST:
            raise ValueError(
                f"scale_jitter {[low, high]} makes sides of {sides[0]:.0f} to {sides[1]:.0f} "
                f"pixels; expected {SMALLEST} to {LARGEST}"
            )
        for arm, methods in self.arms.items():
            if not re.fullmatch(ARM_NAME, arm) or arm in OTHER_ARMS or not methods:
                raise ValueError(
                    f"arm {arm!r} needs another name (letters, digits, _ - +) or a method, "
                    f"e.g. arms: {{deep: {{crosskd: {{depth: 4}}}}}}"
                )
        if self.crop and self.scale_jitter is None:
            raise ValueError("crop needs scale_jitter, e.g. scale_jitter: [0.5, 2.0]")
        return self

    def methods_of(self, arm: str) -> dict[str, Options]:
        """Methods of an arm by its name in `arms`, or of "crosskd+pkd" with their options here.

        Raises:
            UserError: when such a text names a method more than once.
        """
        if arm in self.arms:
            return self.arms[arm]
        return {name: self.methods.get(name, {}) for name in named_once(arm.split("+"))}


def named_once(methods: list[str]) -> list[str]:
    """The same names; refuses one that occurs again, as its second copy would teach nothing."""
    for name in methods:
        if methods.count(name) > 1:
            raise UserError(f"{'+'.join(methods)} names {name} more than once: name it once")
    return methods


def validate_recipe(
    values: dict[str, Any], where: str, origins: Mapping[Place, str] | None = None
) -> Recipe:
    """Checks plain values.

    Args:
        values: settings by name.
        where: the file or the like that they are from.
        origins: settings that came from elsewhere, and from where.

    Raises:
        UserError: names the place, the field and, for an unknown one, the nearest.
    """
    origins = origins or {}
    for key in values:
        if key not in Recipe.model_fields:
            hint = nearest(str(key), Recipe.model_fields)
            raise UserError(f"{_origin((str(key),), where, origins)}: unknown key {key!r}; {hint}")
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
    place = tuple(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if not place:
        raise UserError(f"{where}: {message}")
    origin = _origin(place, where, origins)
    found = f"{message} (found {first['input']!r})"
    raise UserError(f"{origin}: {'.'.join(place)}: {found}")


def _origin(place: Place, where: str, origins: Mapping[Place, str]) -> str:
    """What set the value at a place: the last that set it, a part of it, or a group around it."""
    found = where
    for key, origin in origins.items():
        common = min(len(key), len(place))
        if key[:common] == place[:common]:
            found = origin
    return found


def resolve_recipe(
    values: dict[str, Any],
    where: str,
    given: Mapping[str, Any] | None = None,
    assignments: Iterable[str] = (),
) -> Recipe:
    """Recipe values, then what a command's options gave, then `--set`.

    Args:
        values: of the recipe file.
        where: that file.
        given: options by setting; None = not given.
        assignments: texts `key=value`, `key.key=value`.
    """
    options = {key: value for key, value in (given or {}).items() if value is not None}
    origins: dict[Place, str] = {(key,): f"--{key} {value}" for key, value in options.items()}
    values = values | options
    for assignment in assignments:
        origins[_set_value(values, assignment)] = f"--set {assignment}"
    return validate_recipe(values, where, origins)


def split_teacher(teacher: str) -> tuple[str | None, Path]:
    """`NAME=FILE`, for weights of other frameworks, to both; anything else is a path alone."""
    name, equals, file = teacher.partition("=")
    if equals and not Path(teacher).exists():
        return name, Path(file)
    return None, Path(teacher)


class _DuplicateKeyError(yaml.YAMLError):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses keys that occur twice, of which the standard loader takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise _DuplicateKeyError(f"the key {key!r} occurs twice; keep one of them")
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Plain values from a YAML text; `where` names it in errors."""
    try:
        # A subclass of the safe loader, which builds plain values only.
        return yaml.load(text, Loader=_Loader)
    except _DuplicateKeyError as error:
        raise UserError(f"{where}: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot read the recipe: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a YAML file: {error}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        found = type(values).__name__
        raise UserError(f"{path}: a recipe is a list of `key: value` lines, found a {found}")
    return values


def _set_value(values: dict[str, Any], assignment: str) -> Place:
    """Applies one `a.b=c` in place and returns (a, b); the value is read as YAML."""
    key, equals, text = assignment.partition("=")
    place = tuple(key.split("."))
    if not equals or not all(place):
        raise UserError(f"--set {assignment}: expected key=value, e.g. --set max_steps=1")
    value = parse_yaml(text, f"--set {assignment}")
    *parents, last = place
    inner = values
    for parent in parents:
        group = inner.get(parent, {})
        if not isinstance(group, dict):
            raise UserError(f"--set {assignment}: {parent} is {group!r}, not a group of settings")
        inner[parent] = dict(group)  # a copy: the caller's groups stay as they are
        inner = inner[parent]
    inner[last] = value
    return place


def completed(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a recipe that was stored whole, perhaps by an earlier version.

    A setting that it lacks, because it is newer, had its default.
    """
    return {**Recipe.model_validate({}).model_dump(), **stored}


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)
