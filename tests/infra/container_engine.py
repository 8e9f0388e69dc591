"""Podman for tests, with its own store, mount namespace and network namespace, so that it leaves nothing behind."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from patience import wait_until
from testbed import processes

NEEDED = ("podman", "mmdebstrap", "crun", "aardvark-dns", "unshare", "nsenter", "ip")
PACKAGES = "podman netavark aardvark-dns crun iptables iproute2 mmdebstrap"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
APT_SOURCES = Path("/etc/apt/sources.list.d/debian.sources")
SUITE = "bookworm"
"""Release of the base image that is made here; its Python is the one that the image needs."""
PROCESS_LIMIT = 16384
"""Limit of open files and of processes in a container; Podman gives itself twice that."""


def why_none() -> str:
    """Why this machine cannot run containers for a test; empty if it can."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin", "/usr/lib/podman"])
    missing = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    return "" if os.geteuid() == 0 else "only root makes the base image and containers here"


@functools.cache
def compose_command() -> tuple[str, ...]:
    """`docker compose`, or `docker-compose` of version 2 or later; empty if neither is installed."""
    for command in (("docker", "compose"), ("docker-compose",)):
        if shutil.which(command[0]):
            said = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if said.returncode == 0 and said.stdout.lstrip("v").startswith(tuple("23456789")):
                return command
    return ()


@dataclass(frozen=True)
class Engine:
    """A running Podman with Docker's API."""

    folder: Path
    server: subprocess.Popen[bytes]

    @property
    def socket(self) -> str:
        """For DOCKER_HOST."""
        return f"unix://{self.folder / 'docker.sock'}"

    def podman(self, *arguments: str, seconds: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `podman` with the mounts of this engine, in the machine's own network.

        Raises:
            AssertionError: It failed, and `check`; with the end of what it said.
        """
        command = ["nsenter", f"--target={self.server.pid}", "--mount", *_podman(self.folder), *arguments]
        done = subprocess.run(
            command, env=_environment(self.folder), capture_output=True, text=True, timeout=seconds, check=False
        )
        assert not check or done.returncode == 0, f"podman {arguments}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    def run(self, image: str, *command: str, options: Sequence[str] = ()) -> str:
        """What a command prints in a temporary container without network."""
        return self.podman("run", "--rm", "--network=none", *options, image, *command).stdout

    def build(self, dockerfile: Path, context: Path, tag: str, *options: str) -> subprocess.CompletedProcess[str]:
        """Build an image in the machine's network; the caller checks the result."""
        where = ["--isolation=chroot", "--network=host", f"--file={dockerfile}", f"--tag={tag}"]
        return self.podman("build", *where, *options, str(context), seconds=1800, check=False)

    def make_base(self, tag: str) -> None:
        """Make a small Debian with Python from the machine's package sources, with its certificates."""
        tar = self.folder / "base.tar"
        command = [
            "mmdebstrap",
            "--quiet",
            "--variant=minbase",
            "--include=ca-certificates,python3",
            f"--customize-hook=copy-in {CERTIFICATES} {CERTIFICATES.parent}",
            SUITE,
            str(tar),
            *([str(APT_SOURCES)] if APT_SOURCES.exists() else []),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=900)
        self.podman("import", str(tar), tag)
        tar.unlink()

    def make_uv(self, tag: str, version: str) -> None:
        """Make an image that contains only uv, like the published one, from its wheel."""
        folder = self.folder / "uv"
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), f"uv=={version}"]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        (folder / "Dockerfile").write_text("FROM scratch\nCOPY bin/uv /uv\n")
        built = self.build(folder / "Dockerfile", folder, tag)
        assert built.returncode == 0, built.stderr

    def package_sources(self) -> list[str]:
        """Build options with which uv finds packages where pip does here."""
        settings, mounts = uv_settings(_pip_settings())
        file = self.folder / "uv.toml"
        file.write_text(settings)
        places = {place: place for place in mounts if Path(place).exists()} | {str(file): "/etc/uv/uv.toml"}
        return [f"--volume={source}:{target}:ro" for source, target in places.items()]


@contextlib.contextmanager
def container_engine() -> Iterator[Engine]:
    """Run one; containers, images and volumes are deleted with the context."""
    with tempfile.TemporaryDirectory(prefix="engine-") as name:
        folder = Path(name)
        (folder / "containers.conf").write_text(_configuration(folder))
        # crun refuses the mix of both cgroup hierarchies that some hosts mount; ranks and servers here need neither.
        prepared = 'umount /sys/fs/cgroup/unified 2>/dev/null; ip link set lo up; exec "$@"'
        command = ["unshare", "--mount", "--net", "sh", "-c", prepared, "sh", *_podman(folder)]
        with (folder / "podman.log").open("wb") as log:
            serving = [*command, "system", "service", "--time=0", f"unix://{folder / 'docker.sock'}"]
            server = subprocess.Popen(serving, env=_environment(folder), stdout=log, stderr=log)
        engine = Engine(folder, server)
        try:
            wait_until("podman", (folder / "docker.sock").exists, 60)
            yield engine
        finally:
            engine.podman("rm", "--all", "--force", "--time=0", "--volumes", check=False)
            server.terminate()
            server.wait(timeout=60)
            # Watchers of `exec`, which would remain for five minutes
            for process in processes(str(folder), psutil.process_iter()):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def uv_settings(pip: dict[str, str]) -> tuple[str, list[str]]:
    """The contents of uv.toml that correspond to pip's settings, and the folders that they name."""
    lines = ["native-tls = true", 'index-strategy = "unsafe-best-match"']
    mounts: list[str] = []
    for key, value in pip.items():
        if key not in ("index-url", "extra-index-url", "find-links"):
            continue
        places = value.split()
        mounts += [place.removeprefix("file://") for place in places if place.startswith(("/", "file:///"))]
        quoted = ", ".join(f'"{place}"' for place in places)
        lines.append(f"{key} = {quoted}" if key == "index-url" else f"{key} = [{quoted}]")
    # A simple index of files links to its neighbours.
    parents = [str(Path(mount).parent) for mount in mounts if Path(mount).name == "simple"]
    return "\n".join(lines) + "\n", [mount for mount in mounts if Path(mount).name != "simple"] + parents


def _pip_settings() -> dict[str, str]:
    """Settings of pip here; the environment overrides files."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = re.findall(r"^(global|install|:env:)\.([\w-]+)=(.+)$", said.stdout, re.MULTILINE)
    found.sort(key=lambda entry: entry[0] == ":env:")
    return {key: str(ast.literal_eval(value)) for _, key, value in found}


def _podman(folder: Path) -> list[str]:
    return ["podman", f"--root={folder / 'store'}", f"--runroot={folder / 'run'}", "--storage-driver=overlay"]


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "CONTAINERS_CONF": str(folder / "containers.conf"), "TMPDIR": str(folder)}


def _configuration(folder: Path) -> str:
    """Limits of processes are below those of Podman itself: not every machine allows raising them."""
    hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))[1] for name in ("nofile", "nproc")}
    bounded = {name: limit if 0 < limit < PROCESS_LIMIT else PROCESS_LIMIT for name, limit in hard.items()}
    limits = ", ".join(f'"{name}={limit}:{limit}"' for name, limit in bounded.items())
    return f"""
[containers]
cgroups = "disabled"
default_ulimits = [{limits}]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
tmp_dir = "{folder / "tmp"}"
volume_path = "{folder / "volumes"}"
[network]
network_backend = "netavark"
network_config_dir = "{folder / "networks"}"
"""
