"""One run of a study as a program: `python -m detdistill.study.worker RECIPE RUN STUDY TASK`.

STUDY is the number of the study's process; TASK is "train", or "test" for training and test.
"""

from __future__ import annotations

import sys
from pathlib import Path

from detdistill.data.loader import end_with_parent
from detdistill.engine.train import train
from detdistill.errors import DivergedError, UserError, is_first_here, tells
from detdistill.recipe import read_yaml, validate_recipe
from detdistill.study.runs import DIVERGED, train_and_test


def main(arguments: list[str]) -> int:
    """Trains or resumes, and tests; exit codes are those of the command line, and `DIVERGED`.

    It ends with the study, also with one that was killed. A run on several devices, in each of
    whose processes this program runs, is tested by the study.
    """
    recipe_file, folder, study, task = arguments
    if is_first_here():  # the others end with it
        end_with_parent(int(study))
    try:
        recipe = validate_recipe(read_yaml(Path(recipe_file)), recipe_file)
        if task == "train":
            train(recipe, Path(folder), resume=True)
        else:
            train_and_test(recipe, Path(folder))
    except UserError as error:
        if tells(error):
            print(f"detdistill: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergedError) else 2
    except KeyboardInterrupt:
        return 130  # the study, which is interrupted too, says how to go on
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
