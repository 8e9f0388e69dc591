#!python
"""The `convmae` command as it is installed.

Our packages have common names: `pipeline`, `model`, `jobs`. A package of the same name that precedes ours on Python's
path would be imported, and run, instead. So this file imports none of them before it knows that it is ours: it is
installed as a script (pyproject.toml), which needs no package to be found first. The folder in which a command is typed
is never on the path: an installed script adds its own folder, and `jobs.run.own_code.module_command` adds none.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGES = ("jobs", "pipeline", "model")
_LANDMARKS = ("jobs/stack/keeper.py", "pipeline/shard/index.py", "model/convmae.py")
"""Files that show that a folder holds this project's packages."""


def strange_package(path: Sequence[str] | None = None) -> tuple[str, str] | None:
    """The first of our packages that Python would import from elsewhere: its name, and that file or folder.

    Args:
        path: Where Python looks; default: `sys.path`. Nothing is imported.
    """
    places = {name: _place(name, path) for name in PACKAGES}
    for name, place in places.items():
        if place is not None and not all((place.parent / landmark).is_file() for landmark in _LANDMARKS):
            return name, str(place)
    return None


def _place(name: str, path: Sequence[str] | None) -> Path | None:
    """What would be imported under a name: a package's folder or a file; None if there is nothing."""
    spec = PathFinder.find_spec(name, path)
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(spec.origin or name)


def main() -> None:
    """Run the command, unless another package would run instead of ours."""
    found = strange_package()
    if found and sys.stderr:
        name, place = found
        named = [Path(folder).resolve() for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        field = "PYTHONPATH" if Path(place).resolve().parent in named else "Python's path"
        rule = f"must not have another `{name}` before ours, which would run instead"
        remedy = "unset PYTHONPATH for this command, rename that one, or install into an environment of its own"
        sys.stderr.write(f"error: {field}: {rule}, got {place!a}; {remedy}\n")
    if found:
        sys.exit(2)
    from jobs.cli.main import main as run_command

    run_command()


if __name__ == "__main__":
    main()
