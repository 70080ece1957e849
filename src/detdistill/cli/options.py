"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[
    str | None,
    typer.Option("--data", metavar="FOLDER", help="COCO, YOLO or Pascal VOC data."),
]
Out = Annotated[
    Path,
    typer.Option("--out", metavar="RUN", help="New or empty folder, or the one to go on with."),
]
RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe file, or a name of `list recipes`."),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="A.B=C", help="Override one setting; may be repeated."),
]
DetectorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="OPTION=VALUE",
        help="An option of the detector, e.g. norm_on_bbox=true; may be repeated.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at faults of single annotations.")]
Split = Annotated[Literal["train", "val", "test"], typer.Option(help="Which annotations to use.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")]
Devices = Annotated[
    int | None, typer.Option("--devices", metavar="N", help="Processes or GPUs per machine.")
]
Nodes = Annotated[int | None, typer.Option("--nodes", metavar="N", help="Machines.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Seed of every draw.")]
Student = Annotated[
    str | None, typer.Option("--student", metavar="NAME", help="Detector to distil into.")
]
Detector = Annotated[
    str | None, typer.Option("--detector", metavar="NAME", help="See `list detectors`.")
]
Teacher = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="RUN_OR_FILE",
        help="Trained teacher; NAME=FILE for other frameworks' weights.",
    ),
]
TrainedStudent = Annotated[
    str | None,
    typer.Option(
        "--student",
        metavar="RUN_OR_FILE",
        help="Trained student; NAME=FILE for other frameworks' weights.",
    ),
]
TeacherToTrain = Annotated[
    str | None,
    typer.Option(
        "--teacher",
        metavar="RUN_OR_FILE",
        help="Trained teacher, or a detector's name: then it is trained first.",
    ),
]
TeacherEpochs = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Of a teacher trained here, if not the recipe's."),
]
TuneLr = Annotated[
    bool,
    typer.Option(
        "--tune-lr", help="First find the learning rate that is best for the student alone, on val."
    ),
]
Method = Annotated[
    str | None, typer.Option("--method", metavar="NAME", help="Several: crosskd+pkd.")
]
Methods = Annotated[
    str | None,
    typer.Option("--methods", metavar="NAMES", help="Comma between arms: crosskd,crosskd+pkd."),
]
Seeds = Annotated[str, typer.Option("--seeds", metavar="N,N,...", help="Seeds.")]
Jobs = Annotated[
    int,
    typer.Option("--jobs", metavar="N", min=1, help="Runs at once, on many cores or several GPUs."),
]
