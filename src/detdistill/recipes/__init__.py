"""The recipes that come with the package: flat YAML files whose first line runs them."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from detdistill.errors import UserError

_FOLDER = Path(__file__).parent


def list_recipes(pattern: str = "*") -> list[str]:
    """Sorted names of the bundled recipes that match a shell pattern, e.g. `"crosskd/*"`."""
    files = (path.relative_to(_FOLDER) for path in _FOLDER.rglob("*.yaml"))
    names = (path.with_suffix("").as_posix() for path in files)
    return sorted(name for name in names if fnmatch(name, pattern))


def recipe_path(name: str) -> Path:
    """The file of a bundled recipe; `UserError` with the nearest name otherwise."""
    known = list_recipes()
    if name not in known:
        from detdistill.registry import nearest  # costs as much as the rest of the command line

        raise UserError(f"no recipe file and no bundled recipe {name!r}; {nearest(name, known)}")
    return _FOLDER / f"{name}.yaml"
