"""The image's EFA step, run by itself in its own folders, with stand-ins for AWS's installer and for apt."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from manifests import INFRA

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts take root")

INSTALLER = """#!/bin/sh
echo "$*" > "$CALLS"
mkdir -p /opt/amazon/efa/lib /opt/amazon/openmpi5 "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu"
touch /opt/amazon/efa/lib/libfabric.so.1
[ -n "$PLUGIN" ] && touch "/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu/$PLUGIN"
true
"""
MOUNTS = """
set -e
for folder in /opt /etc/ld.so.conf.d /var/lib/apt/lists; do mount -t tmpfs none $folder; done
sh -c "$STEP" || exit $?
find /opt/amazon | sort
readlink /opt/amazon/nccl-plugin/libnccl-net.so || true
cat /etc/ld.so.conf.d/efa.conf || true
"""


def step() -> tuple[str, dict[str, str]]:
    """The command, and the arguments' defaults."""
    text = (INFRA / "docker" / "Dockerfile").read_text()
    (command,) = re.findall(r"^RUN (if \[ \"\$EFA\".*?^    fi)$", text, re.MULTILINE | re.DOTALL)
    return command.replace("\\\n", ""), dict(re.findall(r"^ARG (EFA\w*)=(\S+)$", text, re.MULTILINE))


def ran(tmp_path: Path, plugin: str = "libnccl-net.so", **arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it with an installer that installs `plugin`."""
    command, defaults = step()
    archive = tmp_path / f"aws-efa-installer-{defaults['EFA_VERSION']}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("aws-efa-installer/efa_installer.sh")
        info.size, info.mode = len(INSTALLER), 0o755
        tar.addfile(info, io.BytesIO(INSTALLER.encode()))
    stand_ins = {"wget": f'cp {tmp_path}/"${{4##*/}}" "$3"', "apt-get": "true", "ldconfig": "true"}
    (tmp_path / "bin").mkdir()
    for name, script in stand_ins.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    sha256 = hashlib.sha256(archive.read_bytes()).hexdigest()
    environment = {
        **defaults,
        "EFA_SHA256": sha256,
        **arguments,
        "STEP": command.replace("/tmp/efa", f"{tmp_path}/efa"),
        "CALLS": str(tmp_path / "calls"),
        "PLUGIN": plugin,
        "PATH": f"{tmp_path}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "TMPDIR": str(tmp_path),
    }
    command_line = ["unshare", "--mount", "sh", "-c", MOUNTS]
    return subprocess.run(command_line, check=False, env=environment, capture_output=True, text=True)


def test_without_the_argument_nothing_is_installed(tmp_path: Path) -> None:
    ended = ran(tmp_path)

    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("plugin", ["libnccl-net.so", "libnccl-net-ofi.so"])
def test_libfabric_and_the_plugin_are_found_by_the_loader_and_no_mpi_remains(tmp_path: Path, plugin: str) -> None:
    ended = ran(tmp_path, plugin, EFA="1")

    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[-3:] == [
        f"/opt/amazon/ofi-nccl/lib/x86_64-linux-gnu/{plugin}",
        "/opt/amazon/efa/lib",
        "/opt/amazon/nccl-plugin",
    ]
    assert "/opt/amazon/efa/lib/libfabric.so.1" in lines
    assert not [line for line in lines if "openmpi" in line]
    assert "--skip-kmod" in (tmp_path / "calls").read_text()


def test_an_archive_other_than_the_pinned_one_is_not_unpacked(tmp_path: Path) -> None:
    ended = ran(tmp_path, EFA="1", EFA_SHA256=step()[1]["EFA_SHA256"])

    assert ended.returncode != 0
    assert "FAILED" in ended.stdout and not (tmp_path / "calls").exists()


def test_an_installer_that_brings_no_plugin_fails_the_build(tmp_path: Path) -> None:
    assert ran(tmp_path, plugin="", EFA="1").returncode != 0


def test_version_and_checksum_are_pinned() -> None:
    _, defaults = step()

    assert defaults["EFA"] == "0", "an image for other machines needs nothing from AWS"
    assert re.fullmatch(r"\d+\.\d+\.\d+", defaults["EFA_VERSION"])
    assert re.fullmatch(r"[0-9a-f]{64}", defaults["EFA_SHA256"])
