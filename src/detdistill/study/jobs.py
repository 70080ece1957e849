"""Several trainings of a study at once, each a program of its own."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeVar

import torch

from detdistill.recipe import Recipe
from detdistill.study.runs import (
    RunScore,
    is_finished,
    require_success,
    train_and_test,
    train_once,
    worker_command,
)

T = TypeVar("T")


class Jobs:
    """Where the runs of a study are carried out: `count` at once.

    One at a time runs in this process. Several run in processes of their own, which share the
    CPU's threads and take the CUDA devices in turn.
    """

    def __init__(self, count: int) -> None:
        """`count` from 1 on."""
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None
        self._slots: queue.Queue[int] = queue.Queue()
        for slot in range(count):
            self._slots.put(slot)
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ending = False

    def start(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Calls a function: at once and to its end, or beside `count - 1` others."""
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        done: Future[T] = Future()
        done.set_result(function(*arguments))
        return done

    def train_and_test(self, recipe: Recipe, folder: Path) -> RunScore:
        """Trains (or resumes, or finds finished) one run and tests it once."""
        self._in_a_process(recipe, folder, "test")
        return train_and_test(recipe, folder)

    def train(self, recipe: Recipe, folder: Path) -> None:
        """The same without the test."""
        self._in_a_process(recipe, folder, "train")
        train_once(recipe, folder)

    def _in_a_process(self, recipe: Recipe, folder: Path, task: Literal["train", "test"]) -> None:
        """Where several run at once; afterwards the run is found finished."""
        if self._pool is None or is_finished(recipe, folder):
            return
        slot = self._slots.get()
        try:
            with self._process(
                worker_command(recipe, folder, task), self._environment(slot)
            ) as process:
                assert process.stdout is not None, "it is piped"
                for line in process.stdout:
                    print(line, end="", file=sys.stderr, flush=True)
        finally:
            self._slots.put(slot)
        require_success(process.returncode, f"{folder}: training failed, see above")

    @contextmanager
    def _process(
        self, command: list[str], environment: dict[str, str]
    ) -> Iterator[subprocess.Popen[str]]:
        with self._lock:
            if self._ending:
                raise KeyboardInterrupt
            pipe = subprocess.PIPE
            process = subprocess.Popen(
                command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True
            )
            self._running.add(process)
        try:
            with process:
                yield process
        finally:
            with self._lock:  # `closing` may be going through them
                self._running.discard(process)

    def _environment(self, slot: int) -> dict[str, str]:
        """Of a process: its share of the threads, and one of the CUDA devices that we see."""
        threads = max(1, torch.get_num_threads() // self.count)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if torch.cuda.device_count() > 1:
            every = ",".join(map(str, range(torch.cuda.device_count())))
            devices = os.environ.get("CUDA_VISIBLE_DEVICES", every).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return environment

    @contextmanager
    def closing(self) -> Iterator[Jobs]:
        """Waits for all that was started; after an error it stops it, to be resumed later."""
        try:
            yield self
        except BaseException:
            with self._lock:
                self._ending = True
                for process in self._running:
                    process.terminate()
            raise
        finally:
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)
