"""Checkpoints with Python objects beside the tensors: metadata is passed over, code never runs."""

import argparse
import collections
import datetime
import pathlib
import pickle
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch

from detdistill import UserError, load_detector
from detdistill.detectors.files import read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2)}


@pytest.fixture
def mmengine(monkeypatch):
    """Packages of which only the test that saves has anything; `gone()` takes them away."""

    class HistoryBuffer:
        def __init__(self, values):
            self._log_history, self.max_length = np.array(values), 10

    class ConfigDict(dict):
        def __getstate__(self):
            return dict(self)

        def __setstate__(self, state):
            raise AssertionError("a stand-in was wanted, not the class")

    classes = {
        "mmengine.logging.history_buffer": HistoryBuffer,
        "mmengine.config.config": ConfigDict,
    }
    for package in ("mmengine", "mmengine.logging", "mmengine.config"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for name, cls in classes.items():
        module = types.ModuleType(name)
        cls.__module__, cls.__qualname__ = name, cls.__name__
        setattr(module, cls.__name__, cls)
        monkeypatch.setitem(sys.modules, name, module)

    def gone():
        for name in classes:
            monkeypatch.delitem(sys.modules, name)

    return types.SimpleNamespace(buffer=HistoryBuffer, config=ConfigDict, gone=gone)


def test_metadata_of_mmengine_is_passed_over(tmp_path, mmengine):
    config = mmengine.config(model=mmengine.config(type="GFL"), lr=0.1)
    buffer = mmengine.buffer([1.0, 2.0])
    checkpoint = {
        "meta": {"cfg": config, "seed": np.int64(3), "loss": np.float32(0.5)},
        "state_dict": STATE,
        "message_hub": {"log_scalars": collections.OrderedDict(loss=buffer)},
    }
    torch.save(checkpoint, tmp_path / "epoch_12.pth")
    mmengine.gone()
    assert read_state(tmp_path / "epoch_12.pth").keys() == STATE.keys()
    assert "mmengine.config.config" not in sys.modules


def test_a_checkpoint_of_torchvisions_scripts(tmp_path):
    args = argparse.Namespace(
        lr=0.1, out=pathlib.PurePosixPath("/a"), day=datetime.date(2024, 1, 2)
    )
    torch.save({"model": STATE, "args": args, "epoch": 3}, tmp_path / "model_3.pth")
    found = read_state(tmp_path / "model_3.pth")
    for key, tensor in STATE.items():
        assert torch.equal(found[key], tensor)


def test_yolo_models_and_checkpoints_for_resume_are_told_as_such(tmp_path, monkeypatch):
    module = types.ModuleType("ultralytics.nn.tasks")
    model = type("DetectionModel", (), {"__module__": module.__name__})
    module.DetectionModel = model
    for package in ("ultralytics", "ultralytics.nn"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"model": model()}, tmp_path / "yolo11n.pt")
    tensors = {"model.0.conv.weight": torch.zeros(2), "model.22.cv2.bias": torch.zeros(2)}
    torch.save(tensors, tmp_path / "clean.pth")
    told = "is a YOLO model, which is none of our detectors; train a teacher"
    for name in ([], ["gfl_r50"]):
        for file in ("yolo11n.pt", "clean.pth"):
            with pytest.raises(UserError, match=told):
                load_detector(*name, tmp_path / file)
    (tmp_path / "last.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="is what --resume goes on from, not weights"):
        load_detector(tmp_path / "last.ckpt")


class Calls:
    """Pickled as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(mark):
    """Each way to leave a file behind by code in a pickle."""
    path = str(mark)
    return {
        "open": Calls(open, path, "w"),
        "eval": Calls(eval, f"open({path!r}, 'w')"),
        "exec": Calls(exec, f"open({path!r}, 'w')"),
        "system": Calls(__import__("os").system, f"touch {path}"),
        "popen": Calls(__import__("subprocess").Popen, ["touch", path]),
        "getattr": Calls(getattr, pathlib.Path(path), "touch"),
        "pathlib": Calls(pathlib.Path.touch, pathlib.Path(path)),
        "numpy": Calls(np.save, path, np.zeros(1)),
        "partial": Calls(__import__("functools").partial, open, path),
    }


@pytest.mark.parametrize("kind", touch("x"))
@pytest.mark.parametrize("place", ["meta", "state_dict", "key"])
@pytest.mark.parametrize("new_format", [True, False])
def test_code_does_not_run(tmp_path, kind, place, new_format):
    mark, file = tmp_path / "mark", tmp_path / "evil.pth"
    evil = touch(mark)[kind]
    checkpoint = {
        "meta": {"meta": evil, "state_dict": STATE},
        "state_dict": {"state_dict": {**STATE, "evil": evil}},
        "key": {"state_dict": {**STATE, evil: STATE["a.bias"]}},
    }[place]
    torch.save(checkpoint, file, _use_new_zipfile_serialization=new_format)
    try:
        assert read_state(file).keys() == STATE.keys()
        ran = None
    except UserError as error:
        ran = str(error)
    assert not mark.exists() and not mark.with_suffix(".npy").exists()
    if kind not in ("pathlib", "numpy"):  # these are taken for metadata, and stood in for
        assert ran is not None and "evil.pth" in ran


def test_a_plain_pickle_with_code_does_not_run(tmp_path):
    for kind, evil in touch(tmp_path / "mark").items():
        (tmp_path / f"{kind}.pth").write_bytes(pickle.dumps(evil))
        with pytest.raises(UserError, match=rf"{kind}\.pth"):
            read_state(tmp_path / f"{kind}.pth")
    assert not (tmp_path / "mark").exists()


def test_a_name_hidden_from_the_search_is_refused(tmp_path):
    """A global that is only read by newer opcodes (STACK_GLOBAL) is not searched, nor made."""
    torch.save({"state_dict": STATE}, tmp_path / "good.pth")
    name = pickle.SHORT_BINUNICODE + struct.pack("<B", 8) + b"builtins"
    call = pickle.SHORT_BINUNICODE + struct.pack("<B", 5) + b"print"
    evil = pickle.PROTO + b"\x04" + name + call + pickle.STACK_GLOBAL + b")R."
    with (
        zipfile.ZipFile(tmp_path / "good.pth") as good,
        zipfile.ZipFile(tmp_path / "evil.pth", "w") as bad,
    ):
        for item in good.namelist():
            bad.writestr(item, evil if item.endswith("data.pkl") else good.read(item))
    with pytest.raises(UserError, match=r"evil\.pth"):
        read_state(tmp_path / "evil.pth")


def test_foreign_objects_are_named_with_the_way_out(tmp_path):
    torch.save({"state_dict": STATE, "net": torch.nn.Linear(1, 1)}, tmp_path / "whole.pth")
    with pytest.raises(
        UserError, match=r"torch\.nn\.modules\.linear\.Linear.*could run code.*save"
    ):
        read_state(tmp_path / "whole.pth")


def test_stand_ins_are_for_one_file_only(tmp_path):
    torch.save({"state_dict": STATE, "args": argparse.Namespace(a=1)}, tmp_path / "args.pth")
    before = set(torch.serialization.get_safe_globals())
    read_state(tmp_path / "args.pth")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "args.pth", weights_only=True)
