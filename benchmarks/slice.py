"""Runs a study on a machine that is lent for minutes at a time, slice by slice.

    python benchmarks/slice.py --minutes 9 --archive study.tgz -- \\
        --recipe small/head --teacher-epochs 10 --seeds 0,1,2 --jobs 15 \\
        --data shapes --out runs/head

What stands after `--` goes to `detdistill compare`. When the time is up the study is interrupted,
which it survives, and its folder is packed: tables, report, weights, logs, and the checkpoints of
runs that are not done yet or hold HEAD's assistant, which `analyze` looks at. The same command with
that archive, on another machine if need be, goes on. Exit code 0 when the study is done, 75 when it
takes another slice.
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
from detdistill.recipe import read_yaml

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


def study_folder(compare: list[str]) -> Path:
    """What `--out` says among the options of `detdistill compare`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--out", type=Path, nargs="?")
    out: Path | None = parser.parse_known_args(compare)[0].out
    if out is None:
        sys.exit("no folder was given: add --out FOLDER after --, e.g. --out runs/head")
    if out.is_absolute() or ".." in out.parts or not out.parts:
        sys.exit(f"--out {out}: expected a folder below this one")
    return out


def needs_checkpoint(run: Path) -> bool:
    """Whether it is not done yet, or of HEAD, whose assistant `last.ckpt` alone holds."""
    if finished_run(run) is None:
        return True
    recipe = run / "recipe.yaml"
    return recipe.is_file() and "head" in (read_yaml(recipe).get("methods") or {})


def pack(folder: Path, archive: Path) -> None:
    """The study without what nobody needs any more."""

    def kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        path = Path(entry.name)
        if path.name == "last.ckpt" and not needs_checkpoint(path.parent):
            return None
        return None if path.name.startswith("best.") else entry

    part = archive.with_suffix(".part")
    with tarfile.open(part, "w:gz", compresslevel=1) as tar:
        tar.add(folder, filter=kept)
    os.replace(part, archive)


def main() -> int:
    options = parse_arguments()
    out = study_folder(options.compare)
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
