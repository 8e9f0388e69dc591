"""The session of a command: the cluster that RAY_ADDRESS names or the local stack's, and the object store.

RAY_ADDRESS leads to the user's own cluster, and the shell's AWS settings to their own store (store_choice). The
environment is put together once, for this process and for those that it starts.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jobs.cluster import address as cluster_address
from jobs.cluster.address import ClusterAddress
from jobs.cluster.key_renewal import start_renewal
from jobs.cluster.ray_internals.core import printable_command_line
from jobs.cluster.store_choice import STORE_VARIABLE, chosen_store, is_of_stack, naming_variable
from jobs.errors import ClusterError, DependencyError
from jobs.run import roots
from jobs.run.directory import RunDirectory
from jobs.run.own_code import PROJECT
from jobs.stack.record import Stack
from pipeline.access.aws_session import configured_session
from pipeline.access.places import is_place, normal
from pipeline.access.proxies import without_loopback
from pipeline.errors import StorageError, UserError
from pipeline.store.storage import Storage

NAMESPACE = "convmae"
HOME_VARIABLE = "CONVMAE_HOME"
VERBOSE_VARIABLE = "CONVMAE_VERBOSE"
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the driver of a submitted job."""


def home_folder(environ: Mapping[str, str]) -> Path:
    """The local stack's folder: $CONVMAE_HOME, or `.convmae` in the current folder."""
    return Path(normal(environ.get(HOME_VARIABLE) or ".convmae"))


@dataclass(frozen=True)
class Session:
    """What one command was started with."""

    environ: Mapping[str, str]
    home: Path
    stack: Stack | None
    storage: Storage

    @classmethod
    def open(cls, environ: Mapping[str, str]) -> Session:
        """Find the local stack, if it is up, and the object store; connects to nothing."""
        home = home_folder(environ)
        stack = Stack.load(home)
        local = stack.environment() if stack else {}
        given = {name: value for name, value in environ.items() if value or not name.startswith(("AWS_", "RAY_"))}
        if address := given.pop("RAY_ADDRESS", "").strip():
            given["RAY_ADDRESS"] = ClusterAddress.spelled(address)
        if stack and given.get("RAY_ADDRESS") == stack.dashboard_url:
            given["RAY_ADDRESS"] = stack.ray_address  # one cluster, whichever of its addresses was exported
        if "RAY_ADDRESS" in given and given["RAY_ADDRESS"] != local.get("RAY_ADDRESS"):
            local = {}
        ray = {key: value for key, value in local.items() if key.startswith("RAY_")}
        merged = {**ray, **given, **without_loopback(given)}
        storage = chosen_store(merged, stack if ray else None)
        merged.pop(STORE_VARIABLE, None)
        return cls(merged, home, stack, storage)

    @property
    def is_local(self) -> bool:
        """Whether work goes to the local stack's own cluster."""
        return self.stack is not None and self.environ["RAY_ADDRESS"] == self.stack.environment()["RAY_ADDRESS"]

    @property
    def is_on_stack(self) -> bool:
        """Whether cluster and object store are the local stack's own."""
        return self.is_local and is_of_stack(self.storage, self.stack)

    @property
    def is_in_job(self) -> bool:
        """Whether this process is the driver of a submitted job."""
        return JOB_VARIABLE in self.environ

    @property
    def is_verbose(self) -> bool:
        """Whether lines of Ray and of workers are shown among the command's own."""
        return self.environ.get(VERBOSE_VARIABLE, "").strip().lower() not in ("", "0", "false", "no", "off")

    @cached_property
    def cluster(self) -> ClusterAddress:
        """The cluster that work goes to.

        Raises:
            ClusterError: No cluster is named, or its address is not valid.
        """
        if "RAY_ADDRESS" not in self.environ:
            remedy = f"start the local stack with `convmae up`, or set RAY_ADDRESS: {cluster_address.FORMS}"
            raise ClusterError("RAY_ADDRESS", "must name a cluster when the local stack is not up", "", remedy)
        return ClusterAddress.parse(self.environ["RAY_ADDRESS"])

    @cached_property
    def is_away(self) -> bool:
        """Whether the cluster takes only jobs from here: this machine is not one of its nodes, or names it by HTTP.

        Raises:
            ClusterError: HOST:PORT was named, and does not answer.
        """
        if self.is_local or self.is_in_job or "RAY_ADDRESS" not in self.environ:
            return False
        return not self.cluster.is_of_this_machine()

    @cached_property
    def has_credentials(self) -> bool:
        """Whether botocore finds credentials for S3 here; asks a machine's metadata service for a second at most."""
        if self.storage.key or self.storage.profile or self.storage.fault:  # a fault is reported on use
            return True
        from botocore.exceptions import BotoCoreError

        try:
            return configured_session(self.environ).get_credentials() is not None
        except BotoCoreError:  # a role that cannot be assumed: reported on use
            return True

    def run_root(self, given: str = "") -> str:
        """The URL under which runs are kept: the given one, CONVMAE_RUN_ROOT, the local stack's, or the last used.

        Args:
            given: By recipe or option.

        Raises:
            UserError: None is known, or it is not a URL.
        """
        variable = self.environ.get(roots.VARIABLE, "")
        place = given or variable or self._usual_root()
        try:
            return normal(place)
        except StorageError as error:
            field = "run_root" if given or not variable else roots.VARIABLE
            raise UserError(field, error.rule, error.value, error.remedy) from None

    def remember_run_root(self, root: str) -> None:
        """Remember a run root that works, for the next command on the same cluster."""
        if not self.is_local and not self.is_in_job and "RAY_ADDRESS" in self.environ:
            roots.remember(roots.state_folder(self.environ), self.cluster.text, root)

    def _usual_root(self) -> str:
        if self.stack is not None and self.is_local:
            return self._stack_root(self.stack)
        if self.stack is None and "RAY_ADDRESS" not in self.environ:
            remedy = f"give run_root=URL, set {roots.VARIABLE}, or start the local stack with `convmae up`"
            raise UserError("run_root", "must be a URL when the local stack is not up", "", remedy)
        if root := roots.remembered(roots.state_folder(self.environ), self.cluster.text):
            return root
        remedy = f"give it once, as run_root=URL or --run-root URL, or set {roots.VARIABLE}"
        raise UserError("run_root", f"must be a URL; none was used with {self.cluster.text} yet", "", remedy)

    def _stack_root(self, stack: Stack) -> str:
        if self.storage.fault:
            raise self.storage.fault
        if is_of_stack(self.storage, stack):
            return f"s3://{stack.bucket}/runs"
        rule = f"must be a URL, since {naming_variable(self.environ)} names a store other than the local stack's"
        remedy = f"give run_root=URL or --run-root URL, or unset {naming_variable(self.environ)} to use the stack's"
        raise UserError("run_root", rule, "", remedy)

    def run(self, name: str, run_root: str = "") -> RunDirectory:
        """The directory of a run by name, or by its full path or URL."""
        if is_place(name):
            return RunDirectory.at(self.storage, name)
        return RunDirectory.of(self.storage, self.run_root(run_root), name)

    def word_for(self, run: RunDirectory) -> str:
        """The argument with which a command finds a run again: its name in the usual run root, else its directory."""
        try:
            is_usual = self.run_root() == run.root
        except UserError:
            is_usual = False
        return run.name if is_usual else run.url

    def export(self) -> None:
        """Make the session's variables those of this process and its children, before Ray is imported."""
        for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
            del os.environ[name]
        os.environ.pop(STORE_VARIABLE, None)
        ours = ("RAY_", "NO_PROXY", "no_proxy")
        os.environ.update({key: value for key, value in self.environ.items() if key.startswith(ours)})

    def connect(self) -> None:
        """Connect this process to the Ray cluster, as a driver.

        Raises:
            ClusterError: If there is none, it does not answer, or it takes only jobs from here.
        """
        self.cluster.check_answers()
        if self.is_away:
            raise ClusterError(
                "RAY_ADDRESS", "must be a cluster of which this machine is a node", self.cluster.text, "submit a job"
            )
        self.cluster.check_logs()
        import ray

        self.quiet_ray()
        try:
            # Ray puts the driver's current folder first on its workers' path, and the user's may hold a pipeline.py.
            with contextlib.chdir(PROJECT), printable_command_line():
                ray.init(
                    self.cluster.text,
                    namespace=NAMESPACE,
                    logging_level=logging.ERROR,
                    # Progress and results come as values; what ranks print is only in the log of the run's job.
                    log_to_driver=self.is_verbose,
                    runtime_env={} if self.is_in_job else self.code(),
                )
        except DependencyError:
            raise
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise cluster_address.refusal(self.cluster.text, error) from error
        start_renewal(self.storage)

    def quiet_ray(self) -> None:
        """Hide Ray's own lines, unless they are asked for; Ray must be imported already."""
        if not self.is_verbose:
            # Nothing asks for the results of cancelled tasks, and Ray would print their errors.
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
            for handler in logging.getLogger("ray").handlers:
                handler.setLevel(logging.ERROR)

    def code(self) -> dict[str, Any]:
        """The part of Ray's runtime environment that sends the project's code to a cluster of other machines.

        The driver of a submitted job already has it from the job, and Ray refuses to be given it twice.
        """
        if self.is_local or not (PROJECT / "pyproject.toml").exists():
            return {}
        return {"working_dir": str(PROJECT)}
