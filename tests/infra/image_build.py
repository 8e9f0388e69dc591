"""The build of the image, as a user starts it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from container_engine import Engine
from manifests import INFRA, ROOT

DOCKERFILE = INFRA / "docker" / "Dockerfile"
IMAGE = "convmae-pretrain:0.1.0"
PLANTED = "planted-secret-3f1c"
BASE = "localhost/base:1"
UV = "localhost/uv:1"


def make_bases(engine: Engine) -> None:
    """Make the Dockerfile's base images, since there is no registry to pull them from."""
    (version,) = re.findall(r"^ARG UV_IMAGE=\S+:(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    engine.make_base(BASE)
    engine.make_uv(UV, version)


def copy_tree(folder: Path) -> None:
    """The tree of somebody who works in it, with a history, secrets and private data."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, listed.stdout.split("\n")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    for name in (".env", ".git/config", "infra/compose/.env", "infra/ray-up/ray_token", ".convmae/s3_identities.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(PLANTED)


def build(engine: Engine, tree: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """Build the image of a tree; layers that were built before are reused."""
    docker = tree / "infra" / "docker"
    return engine.build(
        docker / "Dockerfile",
        tree,
        tag,
        f"--build-arg=BASE_IMAGE={BASE}",
        f"--build-arg=UV_IMAGE={UV}",
        f"--ignorefile={docker / 'Dockerfile.dockerignore'}",
        *engine.package_sources(),
    )
