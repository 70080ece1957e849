"""The page about a pair: complete, self-contained, the same in every build; and its sentences."""

import json
from dataclasses import replace

import pytest
import torch

from detdistill.analysis.report import write_analysis
from detdistill.analysis.run import analyze
from detdistill.analysis.words import caveats, percent, plain, summarise
from tests.analysis.test_run import pair_of
from tests.drawing.page_reader import read_page

FACTS = {"teacher": "gfl_r18, <teacher>", "student": "gfl_r18, runs/student"}


def write(out, pair, dataset, recipe, **options):
    out.mkdir()
    findings = analyze(pair, dataset, recipe, **options)
    sentences = write_analysis(out, findings, dataset, FACTS)
    return (
        sentences,
        (out / "report.html").read_text(),
        json.loads((out / "analysis.json").read_text()),
    )


def disagreeing():
    """Models whose scores are neither all alike nor all low."""
    pair = pair_of()
    for seed, model in enumerate((pair.teacher, pair.student)):
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.logits.weight, std=0.5)
        torch.nn.init.zeros_(model.logits.bias)
    return pair


@pytest.fixture(scope="module")
def written(dataset, recipe, tmp_path_factory):
    return write(tmp_path_factory.mktemp("page") / "out", disagreeing(), dataset, recipe)


def test_the_page_needs_nothing_beside(written):
    sentences, text, numbers = written
    page = read_page(text)
    assert page.fetched == [] and page.silent == []
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert page.tags.count("svg") == 4 and page.tags.count("table") == 3
    # Rows of four: three images in two parts, and the objects that have candidates enough.
    assert page.tags.count("img") % 4 == 0 and page.tags.count("img") > 2 * 3 * 4
    assert len(set(page.ids)) == len(page.ids)
    assert "$" not in text, "a placeholder was left"
    assert "&lt;teacher&gt;" in text and "<teacher>" not in text
    assert len(sentences) == 4
    assert numbers["about"] == FACTS
    assert numbers["images"] == 6 and numbers["left_out"] == {}


def test_the_same_in_every_build(written, dataset, recipe, tmp_path):
    assert write(tmp_path / "again", disagreeing(), dataset, recipe) == written


def test_what_does_not_apply_is_said(dataset, recipe, tmp_path):
    pair = pair_of("faster_rcnn_r18")
    sentences, text, numbers = write(tmp_path / "out", pair, dataset, recipe, images=3)
    assert text.count("Left out for this pair") == 3
    assert [name for name in numbers["left_out"]] == ["conflict", "ranks", "imitation"]
    assert numbers["conflict"] is None
    assert len(sentences) == 1 and sentences[0].startswith("Similarity")
    assert read_page(text).tags.count("svg") == 1


def test_unequal_widths_are_explained(dataset, recipe, tmp_path):
    _, text, _ = write(tmp_path / "out", pair_of(fpn_channels=24), dataset, recipe, images=3)
    assert "not equally wide" in text


def test_images_without_objects(dataset, recipe, tmp_path):
    empty = [replace(r, crowd=torch.ones_like(r.crowd)) for r in dataset.records]
    sentences, text, _ = write(tmp_path / "out", pair_of(), replace(dataset, records=empty), recipe)
    assert "hold no objects" in text and "No object here has two candidates" in text
    assert "— of the positives" in sentences[0]


def test_caveats():
    assert caveats({"objects": 9, "images": 20}) == []
    [few] = caveats({"objects": 9, "images": 19})
    assert "19 images" in few


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "—"),
        (0.0, "0 %"),
        (1.0, "100 %"),
        (0.99999, "99.9 %"),
        (0.996, "99.6 %"),
        (0.994, "99 %"),
        (0.123, "12 %"),
        (0.0123, "1.2 %"),
        (0.00012, "0.012 %"),
    ],
)
def test_percent(share, text):
    assert percent(share) == text


@pytest.mark.parametrize(("value", "text"), [(None, "—"), (-0.004, "0.00"), (-0.5, "-0.50")])
def test_plain(value, text):
    assert plain(value) == text


def test_the_last_block_speaks_for_its_tower():
    stages = {"backbone": {"8": 0.5, "16": None}, "cls 1": {"8": 0.9}, "cls 2": {"8": 0.25}}
    numbers = {"conflict": None, "ranks": None, "imitation": None}
    [sentence] = summarise({**numbers, "similarity": {"stages": stages}})
    assert "backbone 0.50" in sentence and "cls (last) 0.25" in sentence
    assert "0.90" not in sentence
