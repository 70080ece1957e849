"""The page about a study: complete, self-contained, the same in every build."""

import json
import shutil
import warnings

from detdistill.data import open_dataset
from detdistill.study.curves import COLOURS, LOST, METHOD_COLOURS
from detdistill.study.report import write_report
from tests.drawing.page_reader import read_page
from tests.study.fabricated_study import World, run_study


def test_report_is_self_contained_and_says_what_it_shows(recipe, reported_world, tmp_path):
    out = tmp_path / "study"
    arms = run_study(recipe, out)
    text = (out / "report.html").read_text()
    page = read_page(text)
    assert page.fetched == [] and page.silent == []
    assert "url(" not in text.replace("url(#", "") and "@import" not in text
    assert page.tags.count("svg") == 4 and "table" in page.tags
    assert page.tags.count("img") >= 4 and page.tags.count("img") % 4 == 0
    assert len(set(page.ids)) == len(page.ids), "charts must not share element ids"
    assert f"{arms[2].mean():.1f}" in text and "CrossKD" in text
    assert "crosskd/box" in text  # a loss term has its chart
    assert "$" not in text, "a placeholder was left"


def test_report_without_a_teacher(recipe, reported_world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, teacher=None, methods=["tf_head"], seeds=[0])
    text = (out / "report.html").read_text()
    tags = read_page(text).tags
    assert tags.count("img") >= 3 and tags.count("img") % 3 == 0
    shown = text.partition("<h1>")[2].partition("<dl>")[0].lower()
    assert "tf-head" in shown and "teacher" not in shown and "gap closed" not in shown


def test_several_methods_are_held_against_one_another(recipe, reported_world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, methods=["crosskd", "pkd"])
    page, text = (out / "report.html").read_text(), (out / "results.md").read_text()
    assert "Method against method" in page and "| PKD |" in text.partition("| over |")[2]
    between = json.loads((out / "results.json").read_text())["between"]
    assert {(entry["arm"], entry["over"]) for entry in between} == {
        (arm, over)
        for arm in ("crosskd", "pkd")
        for over in ("student", "crosskd", "pkd", "student_same_time")
        if arm != over
    }
    run_study(recipe, tmp_path / "one", methods=["crosskd"])
    assert "Method against method" not in (tmp_path / "one/report.html").read_text()


def test_no_two_colours_of_a_chart_are_one():
    colours = [*METHOD_COLOURS, *COLOURS.values(), LOST]
    assert len(set(colours)) == len(colours)


def test_report_is_the_same_in_every_build(recipe, reported_world, tmp_path):
    out = tmp_path / "study"
    run_study(recipe, out, seeds=[0])
    first = (out / "report.html").read_bytes()
    run_study(recipe, out, seeds=[0])
    assert (out / "report.html").read_bytes() == first


def test_any_class_name_can_be_drawn(recipe, data_folder, monkeypatch, tmp_path):
    folder = shutil.copytree(data_folder, tmp_path / "data")
    names = ["$\\foo$ to $2", "漢字 🙂", "long " * 40]
    for path in (folder / "annotations").iterdir():
        values = json.loads(path.read_text())
        for category, name in zip(values["categories"], names, strict=True):
            category["name"] = name
        path.write_text(json.dumps(values))
    recipe = recipe.model_copy(update={"data": str(folder)})
    World(open_dataset(recipe, "test")).install(monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")
        run_study(recipe, tmp_path / "study", seeds=[0])
    text = (tmp_path / "study/report.html").read_text()
    assert names[0] in text and names[1] in text
    assert ("long " * 8)[:-1] + "…" in text


def test_names_are_escaped(recipe, reported_world, tmp_path):
    out = tmp_path / "study"
    arms = run_study(recipe, out, seeds=[0])
    write_report(out, recipe, arms, ["<script>alert(1)</script>"], ["<b>"], {"<i>": "<u>"})
    text = (out / "report.html").read_text()
    assert "<script" not in text and "<u>" not in text and "&lt;b&gt;" in text
