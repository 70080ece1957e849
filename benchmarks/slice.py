"""Runs a study on a machine that is lent for minutes at a time, slice by slice.

    python benchmarks/slice.py --minutes 9 --archive study.tgz -- \\
        --recipe small/head --seeds 0,1,2 --jobs 12 --data shapes --out runs/head

What stands after `--` goes to `detdistill compare`. When the time is up the study is interrupted,
which it survives, and its folder is packed: tables, report, weights, logs, and the checkpoints of
runs that are not done yet. The same command with that archive, on another machine if need be, goes
on. Exit code 0 when the study is done, 75 when it takes another slice.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

from detdistill.engine.run import finished_run

GRACE = 20  # seconds to end in, once interrupted
AGAIN = 75  # as in sysexits.h: try again


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--archive", type=Path, required=True, help="read if there, then written")
    parser.add_argument("compare", nargs="+", help="after --: the options of `detdistill compare`")
    return parser.parse_args()


def run_for(seconds: float, command: list[str]) -> int:
    """Its exit code, or `AGAIN` where it had to be interrupted."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return AGAIN


def pack(folder: Path, archive: Path) -> None:
    """The study without what nobody needs any more."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        done = path.name == "last.ckpt" and finished_run(path.parent) is not None
        return None if done or path.name.startswith("best.") else entry

    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz", compresslevel=1) as tar:
        tar.add(folder, filter=kept)
    os.replace(part, archive)


def main() -> int:
    options = parse_arguments()
    out = Path(options.compare[options.compare.index("--out") + 1])
    if out.is_absolute() or ".." in out.parts:
        sys.exit(f"--out {out}: expected a folder below this one")
    if options.archive.exists() and not out.exists():
        with tarfile.open(options.archive) as tar:
            tar.extractall(filter="data")
    command = [sys.executable, "-m", "detdistill.cli", "compare", *options.compare]
    code = run_for(60 * options.minutes, command)
    if out.exists():
        pack(out, options.archive)
    return code


if __name__ == "__main__":
    sys.exit(main())
