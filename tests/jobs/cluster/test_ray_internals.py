"""The door to Ray's insides: what is missing is named in one line, and nobody passes by the door."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import ray._private.state

import jobs
from jobs.cluster.ray_internals.table import (
    OF_COMMANDS,
    OF_DRIVERS,
    OF_STANDBY,
    PINNED,
    Internal,
    check_ray,
    of_ray,
)
from jobs.errors import DependencyError

PROJECT = Path(jobs.__file__).parent.parent
DOOR = PROJECT / "jobs/cluster/ray_internals"
UNDOCUMENTED_WORDS = ("_private", "_raylet", "_internal", "_common", "generated", "v2", "_config")
"""Of module paths of Ray."""
PRIVATE_WORDS = frozenset(
    {
        *("_do_request", "_create_default_callbacks", "_initialize_and_run_controller", "_get_reserved_resources"),
        *("_count_possible_workers", "_get_resize_decision", "_send_resource_request", "_requester_id"),
        *("_coordinator_client", "_autoscaling_coordinator", "_latest_reserved_resources", "core_worker"),
        "global_worker",
    }
)


@pytest.mark.parametrize("internal", [*OF_COMMANDS, *OF_DRIVERS, *OF_STANDBY], ids=lambda internal: internal.path)
def test_the_installed_ray_has_it(internal: Internal) -> None:
    of_ray(internal.path)


def test_the_pinned_version_is_that_of_the_constraints() -> None:
    assert f"\nray=={PINNED}\n" in (PROJECT / "constraints.txt").read_text()


def test_what_is_missing_is_named_in_one_line_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    check_ray()
    monkeypatch.delattr(ray._private.state, "actors")

    with pytest.raises(DependencyError) as caught:
        check_ray()

    assert str(caught.value) == (
        f"ray: must have ray._private.state.actors, as version {PINNED} has, got {version('ray')!r}; "
        "install the pinned version: pip install -c constraints.txt ray"
    )


@pytest.mark.parametrize("path", ["ray.no_such_module:name", "ray:no_such_name", "ray:nodes.no_such_name"])
def test_a_module_or_name_that_is_gone_is_the_same(path: str) -> None:
    with pytest.raises(DependencyError, match=rf"^ray: must have {path.replace(':', '.')}, as version"):
        of_ray(path)


def test_all_that_is_asked_for_is_in_the_table() -> None:
    """So that a test against another version meets all of it."""
    known = [internal.path for internal in (*OF_COMMANDS, *OF_DRIVERS, *OF_STANDBY)]
    modules = {path.partition(":")[0] for path in known}
    asked = {
        node.args[0].value.partition(":")[0]
        for node in ast.walk(ast.parse((DOOR / "core.py").read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "of_ray"
        if isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }
    imported = {f"{module}:{name}" for module, name in imports((DOOR / "train.py").read_text()) if "ray" in module}

    assert asked - modules <= {"ray._private"}, "whose module `utils` is in it"
    missing = {path for path in imported if not any(row.startswith(path) for row in known)}
    assert missing == {"ray.train.torch:TorchConfig"}, "which is documented"


def test_each_is_explained_in_the_docs() -> None:
    text = (PROJECT / "docs/private-api.md").read_text()
    named = {name.split(".")[-1] for name in re.findall(r"`([\w.]+)`", text)}

    used = {re.split("[.:]", internal.path)[-1] for internal in (*OF_COMMANDS, *OF_DRIVERS, *OF_STANDBY)}

    assert used <= named


def test_only_the_door_knows_what_ray_does_not_document() -> None:
    files = [path for path in (PROJECT / "jobs").rglob("*.py") if DOOR not in path.parents]
    assert len(files) > 90

    found = [f"{path.relative_to(PROJECT)}: {word}" for path in files for word in undocumented(path.read_text())]

    assert found == []


def test_a_way_past_the_door_is_found() -> None:
    for source in (
        "from ray._private.state import actors",
        "import ray._private.utils",
        "from ray import _config",
        "from ray.train.torch.config import _TorchBackend",
        "from ray.train.v2.api.config import RunConfig",
        "client._do_request('PUT', '/')",
        "ray._raylet.GcsClient()",
        "self._count_possible_workers({})",
    ):
        assert list(undocumented(source)), source
    assert not list(undocumented("import ray\nfrom ray.exceptions import RayError\nray.get(self._reply)"))


def undocumented(source: str) -> Iterator[str]:
    """What a file uses of Ray's insides."""
    for module, name in imports(source):
        words = [*module.split("."), *name.split(".")]
        if words[0] == "ray" and any(word.startswith("_") or word in UNDOCUMENTED_WORDS for word in words if word):
            yield f"{module} {name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            of_ray_itself = isinstance(node.value, ast.Name) and node.value.id == "ray" and node.attr.startswith("_")
            if of_ray_itself or node.attr in PRIVATE_WORDS:
                yield node.attr
        if isinstance(node, ast.FunctionDef) and node.name in PRIVATE_WORDS:
            yield node.name


def imports(source: str) -> Iterator[tuple[str, str]]:
    """Module and name of each import."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)
