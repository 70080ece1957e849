"""What is noted about a study, and how a schedule is stretched."""

import shutil
import subprocess
import sys

from detdistill.recipe import Recipe
from detdistill.study import plan
from detdistill.study.plan import command_line, scaled_epochs, source_commit


def test_a_stretched_schedule_keeps_its_shape():
    recipe = Recipe(epochs=12, schedule="step", milestones=[8, 11], max_steps=600)
    longer = scaled_epochs(recipe, 18)
    assert (longer.epochs, longer.milestones, longer.max_steps) == (18, [12, 16], 900)
    assert scaled_epochs(recipe, 12) == recipe


def test_command_line_names_the_program_without_its_path(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/detdistill", "compare", "--out", "a b"])
    assert command_line() == "detdistill compare --out 'a b'"


def test_commit_is_that_of_the_own_checkout_alone(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    file = tmp_path / "plan.py"
    shutil.copy(plan.__file__, file)
    monkeypatch.setattr(plan, "__file__", str(file))
    assert source_commit() == {}
    git("init")
    assert source_commit() == {}, "not tracked: somebody else's checkout"
    git("add", "plan.py")
    git("commit", "-m", "one")
    assert source_commit() == {"commit": git("rev-parse", "HEAD")}
    file.write_text("changed")
    assert source_commit()["commit"].endswith(" with local changes")
