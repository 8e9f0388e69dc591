"""The most used commands, in the shells, as the users and in the folders that people have: each cell is one command.

A cell ends with 0, 1 or 2, at most one line of error, no traceback and no output of other programs, and what it wrote
is correct. A cell that may end differently from the same command in a plain shell sets `may_fail`.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from testbed import SMALL, Command, small_recipe

from jobs.stack.record import Stack
from pipeline.ingest.photographs import cut_tiles
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

pytestmark = pytest.mark.slow

IMAGES = 12
STEPS = 2
RUN = "environments"
CONVMAE = Path(sys.executable).with_name("convmae")
CELL_SECONDS = 150
_READER = "--inh-caps +dac_read_search --ambient-caps +dac_read_search"
NAMELESS = f"exec setpriv --reuid 54321 --regid 54321 --clear-groups {_READER}"
"""A user without a name, who may read what tests made and write what is open to all."""
FOREIGN = (
    "Traceback",
    "goroutine ",
    "Exception ignored",
    "Fatal Python error",
    "core dumped",
    "Segmentation",
    "During handling",
    "  File ",
)
"""What no command may show."""


@dataclass(frozen=True)
class Environment:
    """A shell in which a command is typed."""

    name: str
    variables: Mapping[str, str | None] = field(default_factory=dict)
    """None unsets a variable. `FOLDER` in a value is the cell's folder."""
    shell: str = ""
    """Words before the command, in sh; `$FOLDER` is the cell's own folder, in which it is typed."""
    files: Mapping[str, str] = field(default_factory=dict)
    """In the cell's folder, by path."""
    may_fail: bool = False
    """Whether exit codes 1 and 2 are fine where a plain shell has 0."""
    hides_output: bool = False
    """Whether standard output is discarded."""


STRICT = {"PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
DEAD_PROXY = "http://127.0.0.1:9"
MODULE = 'print("a module of the caller was imported")\nraise RuntimeError("a module of the caller was imported")\n'

ENVIRONMENTS = (
    Environment("plain"),
    # Locales
    Environment("C", {"LC_ALL": "C", "LANG": None}),
    Environment("POSIX ascii", {"LC_ALL": "POSIX", "LANG": None, **STRICT}),
    Environment("no LANG", {"LANG": None, "LC_ALL": None, "LC_CTYPE": None, **STRICT}),
    Environment("latin-1", {"PYTHONIOENCODING": "latin-1"}),
    Environment("ascii", {"PYTHONIOENCODING": "ascii"}),
    Environment("a locale that is not installed", {"LC_ALL": "xx_YY.ISO-8859-1", "LANG": "xx_YY"}),
    # Rights
    Environment("umask 077", shell="umask 077"),
    Environment("umask 000", shell="umask 000"),
    Environment("HOME unset", {"HOME": None}),
    Environment("HOME missing", {"HOME": "/nonexistent/home"}),
    Environment("HOME a file", {"HOME": "FOLDER/file"}, files={"file": ""}),
    Environment("no name", {"HOME": None, "USER": None, "LOGNAME": None}, shell=NAMELESS, may_fail=True),
    Environment("no name, HOME of another", {"HOME": "/root", "USER": None}, shell=NAMELESS, may_fail=True),
    Environment("a folder of another", {"HOME": "/"}, shell=f"cd /usr; {NAMELESS}", may_fail=True),
    # Proxies
    Environment(
        "a dead proxy", {"HTTP_PROXY": DEAD_PROXY, "HTTPS_PROXY": DEAD_PROXY, "NO_PROXY": None, "no_proxy": None}
    ),
    Environment(
        "a dead proxy in small letters",
        {"http_proxy": DEAD_PROXY, "all_proxy": DEAD_PROXY, "no_proxy": "internal.example"},
    ),
    Environment(
        "a proxy that is none", {"HTTP_PROXY": "not a url", "http_proxy": "socks5h://nowhere:1", "NO_PROXY": ","}
    ),
    # AWS
    Environment("a profile that does not exist", {"AWS_PROFILE": "nope"}, may_fail=True),
    Environment(
        "a broken config",
        {"AWS_CONFIG_FILE": "FOLDER/config"},
        files={"config": "[default\nregion eu\n"},
        may_fail=True,
    ),
    Environment(
        "a config that is missing", {"AWS_CONFIG_FILE": "/nonexistent", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
    ),
    Environment("a config that is a folder", {"AWS_CONFIG_FILE": "FOLDER"}, may_fail=True),
    Environment(
        "empty AWS variables",
        {
            "AWS_ENDPOINT_URL": "",
            "AWS_ACCESS_KEY_ID": "",
            "AWS_SECRET_ACCESS_KEY": "",
            "AWS_PROFILE": "",
            "AWS_REGION": "",
        },
    ),
    Environment("half a pair of keys", {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE"}, may_fail=True),
    Environment("a token alone", {"AWS_SESSION_TOKEN": "x"}, may_fail=True),
    Environment("a region with a blank", {"AWS_REGION": "eu west", "AWS_DEFAULT_REGION": "eu west"}, may_fail=True),
    Environment("a retry mode that is none", {"AWS_RETRY_MODE": "never", "AWS_MAX_ATTEMPTS": "many"}, may_fail=True),
    Environment(
        "accelerate",
        {"AWS_CONFIG_FILE": "FOLDER/config"},
        files={"config": "[default]\ns3 =\n  use_accelerate_endpoint = true\n"},
        may_fail=True,
    ),
    Environment(
        "FIPS and dual stack", {"AWS_USE_FIPS_ENDPOINT": "true", "AWS_USE_DUALSTACK_ENDPOINT": "true"}, may_fail=True
    ),
    Environment(
        "a CA bundle that is missing",
        {"AWS_CA_BUNDLE": "/nonexistent.pem", "REQUESTS_CA_BUNDLE": "/nonexistent.pem"},
        may_fail=True,
    ),
    # Modules and folders
    Environment("PYTHONPATH with pipeline.py", {"PYTHONPATH": "FOLDER"}, files={"pipeline.py": MODULE}, may_fail=True),
    Environment(
        "PYTHONPATH with a package jobs",
        {"PYTHONPATH": "FOLDER"},
        files={"jobs/__init__.py": MODULE, "jobs/cli/main.py": MODULE},
        may_fail=True,
    ),
    Environment(
        "a folder with our names",
        files={"pipeline.py": MODULE, "jobs/__init__.py": MODULE, "model.py": MODULE, "typer.py": MODULE},
    ),
    Environment(
        "a folder with the library's names",
        files={"json.py": MODULE, "types.py": MODULE, "socket.py": MODULE, "ray.py": MODULE},
    ),
    Environment(
        "a folder that is gone",
        shell='mkdir "$FOLDER/gone" && cd "$FOLDER/gone" && rmdir "$FOLDER/gone"',
        may_fail=True,
    ),
    Environment("a folder with a comma and blanks", shell='mkdir "$FOLDER/a, b & c" && cd "$FOLDER/a, b & c"'),
    Environment("a folder that is no UTF-8", shell='d=$(printf "$FOLDER/caf\\351"); mkdir "$d" && cd "$d"'),
    Environment("safe path, no asserts", {"PYTHONSAFEPATH": "1", "PYTHONOPTIMIZE": "1"}),
    # Descriptors and terminals
    Environment("no standard input", shell="exec 0<&-"),
    Environment("no standard output", shell="exec 1>&-", hides_output=True, may_fail=True),
    Environment("no standard error", shell="exec 2>&-"),
    Environment("no descriptors", shell="exec 0<&- 1>&- 2>&-", hides_output=True, may_fail=True),
    Environment("a full output", shell="exec 1>/dev/full", hides_output=True, may_fail=True),
    Environment("64 descriptors", shell="ulimit -n 64", may_fail=True),
    Environment("a dumb terminal", {"TERM": "dumb", "COLUMNS": "1", "LINES": "1"}),
    Environment("no terminal", {"TERM": None, "COLUMNS": "many", "FORCE_COLOR": "1"}),
    Environment("a time zone that is none", {"TZ": "Nowhere/Nix"}),
    Environment("a time zone far away", {"TZ": "XXX-14:59:59"}),
    Environment("TMPDIR missing", {"TMPDIR": "/nonexistent"}, may_fail=True),
    Environment("an address that is none", {"RAY_ADDRESS": "head:port"}, may_fail=True),
    Environment("an address without a cluster", {"RAY_ADDRESS": "127.0.0.1:9"}, may_fail=True),
)

LOOKING = ("list", "status", "history", "logs", "inspect", "stop")
"""These take a second or two each."""
WORKING = ("shard", "verify", "doctor", "shard-folder", "index", "submit")
"""These connect to Ray, or write."""
ALWAYS = {"plain": (*LOOKING, *WORKING), "umask 077": ("shard-folder",), "umask 000": ("shard-folder",)}
PRINTED = {
    "status": ("finished", f"{STEPS} of {STEPS}"),
    "list": (RUN, "finished"),
    "logs": ("finished",),
    "inspect": ("tiny", f"{IMAGES}"),
    "verify": (f"{IMAGES} images",),
    "doctor": ("versions",),
    "submit": (f"{RUN} is finished",),
}
"""What commands print that succeed."""
CODES = {"stop": {2}, "doctor": {0, 1}}
"""Exit codes in a plain shell, if not 0: the run has ended; the machine of the tests may lack something."""


def _cells() -> list[tuple[Environment, str]]:
    """Three commands for each environment, in rotation, so that each command is run in many."""
    cells = []
    for number, environment in enumerate(ENVIRONMENTS):
        turn = (LOOKING[number % 6], LOOKING[(number + 2 + number // 6) % 6], WORKING[(number + number // 6) % 6])
        cells += [(environment, command) for command in dict.fromkeys((*ALWAYS.get(environment.name, ()), *turn))]
    return cells


CELLS = _cells()


@dataclass(frozen=True)
class Shared:
    """What all cells use."""

    convmae: Command
    storage: Storage
    photographs: Path
    data: str
    tars: str
    recipe: Sequence[str]
    """Arguments of the finished run."""
    digest: str
    """Of the data set that a plain shell makes."""
    indexed: str
    """Of the one that it makes of the tars as they are."""


@pytest.fixture(scope="module")
def shared(local_stack: Stack, convmae: Command, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """A data set, tars, and a finished run of a few steps that was submitted as a job."""
    folder = tmp_path_factory.mktemp("shared") / "photographs, caf\u00e9"
    cut_tiles(folder, IMAGES, seed=0)
    folder.parent.chmod(0o755)
    data, tars, indexed = (f"s3://convmae/environments/{name}" for name in ("data", "tars", "indexed"))
    convmae("shard", str(folder), data, "--samples-per-shard", "6")
    storage = Storage.from_environment(local_stack.environment())
    for name in storage.list_names(data):
        if name.endswith(".tar"):
            storage.write(f"{tars}/{name}", storage.read(f"{data}/{name}"))
    convmae("index", tars, "--out", indexed)
    fields = {**SMALL, "global_batch_size": 6, "lanes": 6, "epochs": 1, "warmup_epochs": 0.5, "max_workers": 1}
    recipe = small_recipe(data, **fields)
    convmae("submit", *recipe, "--run", RUN, "--follow")
    digests = [Dataset.open(storage, url).digest for url in (data, indexed)]
    return Shared(convmae, storage, folder, data, tars, recipe, *digests)


@pytest.mark.parametrize(
    ("environment", "command"),
    CELLS,
    ids=[f"{command} in {environment.name}".replace(" ", "-") for environment, command in CELLS],
)
def test_a_command_ends_well_wherever_it_is_typed(
    environment: Environment, command: str, shared: Shared, tmp_path: Path
) -> None:
    if "setpriv" in environment.shell and (os.geteuid() != 0 or not shutil.which("setpriv")):
        pytest.skip("needs root and setpriv")
    folder = tmp_path / "here"
    folder.mkdir()
    tmp_path.chmod(0o755)
    for name, text in environment.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    place = f"s3://convmae/environments/{tmp_path.name}"
    made = str(tmp_path / "made, data") if command == "shard-folder" else place
    ended = _run(environment, folder, _typed(command, shared, made), shared.convmae)

    _check_end(ended, environment, CODES.get(command, {0}))
    if ended.returncode == 0:
        _check_made(command, shared, made, ended.stdout)
    if environment.name.startswith("umask") and command == "shard-folder":
        _check_modes(Path(made), int(environment.name.split()[1], 8))


def _typed(command: str, shared: Shared, made: str) -> list[str]:
    """The words of a command."""
    return {
        "shard": ["shard", str(shared.photographs), made, "--samples-per-shard", "6"],
        "shard-folder": ["shard", str(shared.photographs), made, "--samples-per-shard", "6"],
        "index": ["index", shared.tars, "--out", made],
        "verify": ["verify", shared.data],
        "doctor": ["doctor"],
        "submit": ["submit", *shared.recipe, "--run", RUN],
        "inspect": ["inspect", *shared.recipe],
        "list": ["list"],
    }.get(command, [command, RUN])


def _check_made(command: str, shared: Shared, made: str, out: str) -> None:
    """Check what a command that succeeded has printed and written."""
    assert not [word for word in PRINTED.get(command, ()) if out and word not in out], out
    if command in ("shard", "shard-folder", "index"):
        dataset = Dataset.open(shared.storage, made)
        assert dataset.digest == (shared.indexed if command == "index" else shared.digest)
        assert all(sample.data for sample in dataset.read(range(IMAGES)))
    if command == "history" and out:
        assert len(out.splitlines()) == STEPS


def _run(
    environment: Environment, folder: Path, arguments: list[str], convmae: Command
) -> subprocess.CompletedProcess[str]:
    variables = {**convmae.environment(), "FOLDER": str(folder)}
    for name, value in environment.variables.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value.replace("FOLDER", str(folder))
    words = [str(CONVMAE), *arguments]
    script = environment.shell or ":"
    # A shell that ends in `exec setpriv ...` takes the command's words as its own.
    script = f'{script} "$@"' if "exec setpriv" in script else f'{script}; exec "$@"'
    return subprocess.run(
        ["sh", "-c", script, "sh", *words],
        check=False,
        cwd=folder,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=CELL_SECONDS,
    )


def _check_end(ended: subprocess.CompletedProcess[str], environment: Environment, codes: set[int]) -> None:
    shown = f"code {ended.returncode}\n--- out\n{ended.stdout}\n--- error\n{ended.stderr}"
    assert ended.returncode in (codes | {1, 2} if environment.may_fail else codes), shown
    assert not [word for word in FOREIGN if word in ended.stdout + ended.stderr], shown
    told = [line for line in ended.stderr.splitlines() if line.strip()]
    assert len([line for line in told if line.startswith(("error:", "failed:"))]) <= 1, shown
    assert len(told) <= 1, shown
    if ended.returncode == 2 and environment.name not in ("no descriptors", "no standard error"):
        assert told and told[0].startswith("error:") and len(told[0]) < 1500, shown


def _check_modes(folder: Path, umask: int) -> None:
    """Check that files and folders have the rights that the user's umask leaves."""
    assert folder.is_dir()
    for path in (folder, *folder.rglob("*")):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~umask, path


def test_each_command_runs_in_many_environments() -> None:
    assert len(CELLS) >= 150
    for command in (*LOOKING, *WORKING):
        assert sum(typed == command for _, typed in CELLS) >= 6
