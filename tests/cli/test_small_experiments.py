"""The papers' experiments in small on other detectors, by the flags that the docs give for them."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from detdistill.data import generate_dataset
from detdistill.recipes import recipe_path
from tests.cli.conftest import Run
from tests.cli.test_published_recipes import SMALL

DOCS = Path(__file__).parents[2] / "docs/compare.md"
FLAGS = re.findall(r"^\| .* \| `(--recipe small/[^`]*)`", DOCS.read_text("utf-8"), re.MULTILINE)


def test_the_docs_give_flags() -> None:
    assert len(FLAGS) == 8


@pytest.mark.parametrize(
    "flags",
    [pytest.param(f, marks=[pytest.mark.slow] if i % 3 else []) for i, f in enumerate(FLAGS)],
)
def test_the_flags_of_an_experiment_make_a_study(flags: str, run: Run, tmp_path: Path) -> None:
    """Of the last method, or of those that the flags name; of a step for each run."""
    data = generate_dataset(tmp_path / "data", train=2, val=1, test=1, size=64)
    given = shlex.split(flags)
    recipe = yaml.safe_load(recipe_path(given[1]).read_text("utf-8"))
    if "--methods" not in given:
        given += ["--methods", list(recipe["arms"])[-1]]
    sets = [f"--set={key}={json.dumps(value)}" for key, value in SMALL.items()]
    code, _, err = run(
        "compare", *given, "--data", str(data), "--out", "study", *sets, "--seeds", "0"
    )
    assert code == 0, err
    results = json.loads(Path("study/results.json").read_text("utf-8"))
    methods = given[given.index("--methods") + 1].split(",")
    assert [arm["name"] for arm in results["arms"] if arm["kind"] == "method"] == methods
    asked = dict(zip(given[::2], given[1::2], strict=True))
    trained = yaml.safe_load(Path(f"study/runs/{methods[0]}/seed0/recipe.yaml").read_text("utf-8"))
    assert trained["student"] == asked.get("--student", recipe["student"])
    taught = yaml.safe_load(Path("study/teacher/recipe.yaml").read_text("utf-8"))
    assert taught["student"] == asked.get("--teacher", recipe["teacher"])
