"""Optional programs of the distribution, which `make pretrain` and `make test` install where they may."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

BRING = Path("infra/local/bring").resolve()
NEEDED = ("bash", "cat", "chmod", "echo", "env", "timeout")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A PATH with nothing but what any machine has, and root as the user."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        assert found
        (folder / name).symlink_to(found)
    program(folder / "id", "echo 0")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


def apt(path: Path, *has: str) -> Path:
    """An apt-get that has packages, each with a command of its name, or that of its second half; returns its log."""
    log = path.parent / "apt.log"
    log.touch()
    cases = "\n".join(
        f'*" {package}") echo "#!/bin/sh" >"{path / command}"; chmod +x "{path / command}"; exit 0;;'
        for package, _, command in (each.partition("=") for each in has)
    )
    program(path / "apt-get", f'echo "$@" >>"{log}"\ncase "$*" in\n*update) exit 0;;\n{cases}\nesac\nexit 100')
    return log


def brought(path: Path, *names: str) -> str:
    done = subprocess.run([BRING, *names], env={"PATH": str(path)}, capture_output=True, text=True, check=True)
    assert not done.stderr
    return done.stdout


def test_root_gets_what_is_missing(path: Path) -> None:
    log = apt(path, "prometheus=prometheus", "iproute2=ip")

    assert brought(path, "prometheus", "ip") == "installing prometheus\ninstalling iproute2\n"
    assert log.read_text().count("update") == 1
    assert brought(path, "prometheus", "ip") == ""


def test_what_the_distribution_lacks_npm_brings_where_it_is_there(path: Path) -> None:
    apt(path)
    assert brought(path, "azurite") == "azurite cannot be installed here, so tests of Azure's store are skipped\n"
    log, command = path.parent / "npm.log", path / "azurite-blob"
    program(path / "npm", f'echo "$@" >>"{log}"; echo "#!/bin/sh" >"{command}"; chmod +x "{command}"')

    (line,) = brought(path, "azurite").splitlines()
    assert line.startswith("installing azurite@3.")
    assert log.read_text().split()[:2] == ["install", "-g"]
    assert brought(path, "azurite") == ""


def test_without_root_it_says_how_npm_would_bring_it(path: Path) -> None:
    program(path / "id", "echo 1000")
    apt(path)

    assert "as root: npm install -g azurite@3." in brought(path, "azurite")


def test_the_next_package_is_tried_where_a_distribution_lacks_one(path: Path) -> None:
    apt(path, "chromium=chromium")

    assert brought(path, "chromium") == "installing chromium-headless-shell\ninstalling chromium\n"


def test_what_cannot_be_installed_is_reported_and_no_failure(path: Path) -> None:
    apt(path)

    assert brought(path, "prometheus").splitlines() == [
        "installing prometheus",
        "prometheus cannot be installed here, so metrics are not kept",
    ]


def test_another_user_is_told_the_command(path: Path) -> None:
    log = apt(path, "prometheus=prometheus")
    program(path / "id", "echo 1000")

    assert brought(path, "prometheus") == (
        "prometheus is not installed, so metrics are not kept; as root: apt-get install prometheus\n"
    )
    assert not log.read_text()


def test_a_distribution_without_apt(path: Path) -> None:
    assert brought(path, "chromium") == (
        "chromium is not installed, so tests that look at pages are skipped; as root: apt-get install "
        "chromium-headless-shell\n"
    )


def test_a_browser_of_another_name_will_do(path: Path) -> None:
    program(path / "google-chrome", "true")

    assert brought(path, "chromium") == ""
