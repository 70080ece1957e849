"""Several runs of a study at once, in processes of their own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from detdistill.errors import UserError
from detdistill.study import jobs
from detdistill.study.compare import compare
from detdistill.study.jobs import Jobs
from tests.helpers import is_alive

# Tells that it is there, then waits for as many others as it was told.
MEETING = """
import os, pathlib, sys, time
place, count = pathlib.Path(sys.argv[1]), int(sys.argv[2])
keys = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
(place / str(os.getpid())).write_text(" ".join(os.environ.get(key, "-") for key in keys))
print("waiting for", count, flush=True)
while len(list(place.iterdir())) < count:
    time.sleep(0.02)
"""
FOREVER = "import time; print('begun', flush=True); time.sleep(600)"
REFUSES = "import sys; print('the sentence'); sys.exit(2)"
# A run of 10 minutes that is slow to start, and a study that waits for it.
RUN = """
import os, sys, time
from detdistill.study import worker
worker.read_yaml, worker.Path = time.sleep, lambda path: 600
print(os.getpid(), flush=True)
time.sleep(1)
worker.main(sys.argv[1:])
"""
STUDY = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], "recipe", "run", str(os.getpid()), "train"])
"""


@pytest.fixture
def run_program(monkeypatch, tmp_path):
    """Replaces the program of a run: `run_program(jobs, code, *arguments)` starts one."""
    monkeypatch.setattr(jobs, "is_finished", lambda recipe, folder: False)
    monkeypatch.setattr(jobs, "train_and_test", lambda recipe, folder: folder.name)

    def start(many, code, *arguments):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        monkeypatch.setattr(jobs, "worker_command", lambda recipe, folder, task: command)
        return many.start(many.train_and_test, None, tmp_path / "run")

    return start


def test_runs_are_side_by_side_and_share_the_machine(run_program, tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    place = tmp_path / "place"
    place.mkdir()
    with Jobs(3).closing() as many:
        runs = [run_program(many, MEETING, place, 3) for _ in range(3)]
        assert [run.result(timeout=60) for run in runs] == ["run"] * 3
    assert sorted(file.read_text() for file in place.iterdir()) == ["3 4", "3 4", "3 7"]
    assert capfd.readouterr().err.count("waiting for 3\n") == 3


def test_a_user_s_own_number_of_threads_stays(run_program, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    place = tmp_path / "place"
    place.mkdir()
    with Jobs(2).closing() as many:
        run_program(many, MEETING, place, 1).result(timeout=60)
    assert [file.read_text() for file in place.iterdir()] == ["5 -"]


def test_a_run_that_is_refused_stops_the_others(run_program, capfd):
    with pytest.raises(UserError, match="run: training failed, see above") as told:
        with Jobs(3).closing() as many:
            run_program(many, FOREVER)
            refused = run_program(many, REFUSES)
            waiting = [run_program(many, FOREVER) for _ in range(3)]
            refused.result(timeout=60)
    assert told.value.told, "the run has said why"
    assert "the sentence" in capfd.readouterr().err
    assert all(run.cancelled() or run.exception() for run in waiting)


def test_a_run_that_ends_while_the_others_are_stopped_keeps_none_alive(run_program, monkeypatch):
    stop = subprocess.Popen.terminate

    def slow_stop(process):  # long enough for its thread to take notice before the next
        stop(process)
        time.sleep(0.2)

    monkeypatch.setattr(subprocess.Popen, "terminate", slow_stop)
    with pytest.raises(UserError, match="training failed"), Jobs(4).closing() as many:
        others = [run_program(many, FOREVER) for _ in range(3)]
        time.sleep(0.5)
        run_program(many, REFUSES).result(timeout=60)
    assert all(run.exception() for run in others)


def test_ctrl_c_stops_all_of_them(run_program, capfd):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    many = Jobs(2)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), many.closing():
            run_program(many, FOREVER).result(timeout=60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begin < 30


def test_a_run_ends_with_a_killed_study():
    command = [sys.executable, "-c", STUDY, RUN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        number = it.stdout.readline().strip()
        assert is_alive(number)
        it.kill()
    for _ in range(100):
        if not is_alive(number):
            return
        time.sleep(0.1)
    os.kill(int(number), signal.SIGKILL)
    pytest.fail("the run went on after the study had been killed")


def test_one_job_runs_here_and_in_order():
    seen = []
    with Jobs(1).closing() as many:
        for number in range(3):
            assert many.start(seen.append, number).done()
    assert seen == [0, 1, 2]


@pytest.fixture
def one_thread(monkeypatch):
    """Of the runs here and of those in processes of their own: sums depend on their number."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_study_of_several_jobs_finds_what_one_finds(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("detdistill.study.compare.write_report", lambda *given: None)
    short = recipe.model_copy(update={"epochs": 1, "max_steps": 1, "batch_size": 2})
    options = {"teacher": "gfl_r18", "methods": ["crosskd"], "seeds": [0]}
    rows = compare(short, tmp_path / "two", jobs=2, **options)
    compare(short, tmp_path / "one", **options)
    for arm in ("student", "crosskd"):
        run = f"runs/{arm}/seed0/model.safetensors"
        assert (tmp_path / "two" / run).read_bytes() == (tmp_path / "one" / run).read_bytes()
    assert [len(row.runs) for row in rows] == [1, 1, 1, 1]
    state = json.loads((tmp_path / "two/study.json").read_text())
    assert set(state["runs"].values()) == {"done"} and state["jobs"] == 2
    assert "runs/crosskd/seed0: training" in capsys.readouterr().out
    assert "runs at once: 2" in (tmp_path / "two/results.md").read_text()


def test_a_run_in_a_process_without_its_test(recipe, tmp_path):
    short = recipe.model_copy(update={"epochs": 1, "max_steps": 1, "batch_size": 2})
    with Jobs(2).closing() as many:
        many.start(many.train, short, tmp_path / "runs" / "seed0").result()
    assert (tmp_path / "runs/seed0/model.safetensors").exists()
    assert not list(tmp_path.rglob("test*.json"))


def test_jobs_and_devices_exclude_each_other(recipe, tmp_path):
    many = recipe.model_copy(update={"devices": 2})
    message = r"jobs 2, devices 2: expected .* leave one of the two at 1"
    with pytest.raises(UserError, match=message):
        compare(many, tmp_path / "s", teacher=None, methods=["tf_head"], seeds=[0], jobs=2)
    assert not (tmp_path / "s").exists()
