"""`detdistill export`, and what its page tells a stranger to do with the file."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from PIL import Image

from detdistill import HEAD, PKD, CrossKD, Distiller, save_detector
from detdistill.data import read_image
from detdistill.data.synthetic import draw_scene
from detdistill.distill import Method
from detdistill.export import checks
from tests.cli.conftest import Run
from tests.export.conftest import Export, lively
from tests.helpers import make_batch, narrow
from tests.test_docs import ROOT, blocks


def distilled_run(folder: Path, kind: str) -> None:
    """A GFL after one step beside a wider teacher, with the adapters or the assistant it takes."""
    student, batch = lively("gfl_r18").train(), make_batch(size=(128, 128))
    methods: dict[str, Method]
    if kind == "head":
        teacher, methods = narrow("faster_rcnn_r18", fpn_channels=24), {"head": HEAD()}
    else:
        teacher = narrow("gfl_r18", tower_channels=24, fpn_channels=24, tower_depth=1)
        methods = {"crosskd": CrossKD(depth=1), "pkd": PKD()}
    distiller = Distiller(student, teacher, methods)
    assert len(list(distiller.parameters())) > len(list(student.parameters()))
    optimizer = torch.optim.SGD(distiller.parameters(), lr=1e-4)
    sum(distiller(batch).values()).backward()
    optimizer.step()
    folder.mkdir()
    save_detector(student, folder / "model.safetensors")


def content(path: Path) -> tuple[dict[str, list[int]], list[str], list[str]]:
    """Names and shapes of the constants, the operations, the names of inputs and outputs."""
    graph = onnx.load(path).graph
    constants = {constant.name: list(constant.dims) for constant in graph.initializer}
    interface = [value.name for value in (*graph.input, *graph.output)]
    return constants, [node.op_type for node in graph.node], interface


@pytest.mark.parametrize("kind", ["crosskd+pkd", "head"])
def test_a_distilled_student_leaves_alone(kind: str, run: Run, exported: Export) -> None:
    distilled_run(Path("run"), kind)
    code, out, err = run("export", "--weights", "run", "--out", "new/student.onnx")
    assert code == 0, err
    assert err == ""
    first, second, *interface, parity, portrait, following = out.splitlines()
    assert first.startswith("gfl_r18: exporting") and "opset 18" in second
    assert [line.split(maxsplit=2) for line in interface] == [
        ["input", "images", "(batch, 3, 64, 96) uint8"],
        ["input", "sizes", "(batch, 2) int64"],
        ["output", "boxes_xyxy", "(batch, 129, 4) float32"],
        ["output", "scores", "(batch, 129, 3) float32"],
    ]
    assert parity.startswith("ONNX Runtime and PyTorch differ by at most ")
    assert "--size 96 64" in portrait and following.startswith("Next: ")
    assert [path.name for path in Path("new").iterdir()] == ["student.onnx"]
    found = constants, operations, _ = content(Path("new/student.onnx"))
    assert len(constants) > 30 and operations.count("Conv") > 30
    assert found == content(exported("gfl_r18")[1].path)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--weights", "gone", "--out", "a.onnx"], "gone: no such weights file"),
        (["--weights", "two", "--out", "a.onnx"], "faster_rcnn_r18 has two stages"),
        (["--weights", "one", "--out", "a.onnx"], "--size 320 544"),
        (["--weights", "one", "--out", "a.onnx", "--size", "70", "64"], "e.g. 64 x 64"),
        (
            ["--weights", "one", "--out", "a.onnx", "--size", "64", "64", "--opset", "3"],
            "opset 18 to 23",
        ),
        (["--weights", "one", "--out", "a.pt"], "a.pt: expected a name that ends in .onnx"),
        (["--weights", "one", "--out", "taken.onnx"], "taken.onnx: already exists"),
        (["--weights", "one", "--out", "taken.onnx/a.onnx"], "taken.onnx is a file"),
    ],
    ids=lambda value: " ".join(value)[:60],
)
def test_refusals(arguments: list[str], fragment: str, run: Run) -> None:
    for folder, name in (("one", "gfl_r18"), ("two", "faster_rcnn_r18")):
        Path(folder).mkdir()
        save_detector(narrow(name), Path(folder, "model.safetensors"))
    Path("taken.onnx").write_text("mine")
    code, _, err = run("export", *arguments)
    assert code == 2
    [sentence] = err.splitlines()
    assert sentence.startswith("detdistill: ") and fragment in sentence
    assert sorted(path.name for path in Path().iterdir()) == ["one", "taken.onnx", "two"]


def test_a_missing_package_is_told_before_the_weights_are_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    code, _, err = run("export", "--weights", "gone", "--out", "a.onnx")
    assert code == 2
    assert "onnx, onnxscript, onnxruntime must be installed: pip install 'detdistill[export" in err


@pytest.mark.parametrize("size", [(64, 96), (128, 192), (96, 144)])
def test_the_page_leads_to_what_predict_finds(
    size: tuple[int, int], exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    detector, written = exported("fcos_r18")
    Path("model.onnx").write_bytes(written.path.read_bytes())
    image = Path("my_coco/images/test_000000.jpg")
    image.parent.mkdir(parents=True)
    Image.fromarray(draw_scene(0, "test", 0).image).resize(size[::-1]).save(image)
    names: dict[str, object] = {}
    page = [text for language, text in blocks(ROOT / "docs/export.md") if language == "python"]
    exec(compile(page[0], "export.md", "exec"), names)
    [expected] = detector.predict([read_image(image)])
    strong = expected.scores > 0.3
    rows = names["found"]
    assert isinstance(rows, list) and len(rows) == strong.sum() > 20
    assert [name for _, name, _ in rows] == [f"class {k}" for k in expected.labels[strong]]
    torch.testing.assert_close(torch.tensor([row[0] for row in rows]), expected.scores[strong])
    boxes = torch.tensor([row[2] for row in rows])
    torch.testing.assert_close(boxes, expected.boxes_xyxy[strong], rtol=1e-4, atol=0.05)
