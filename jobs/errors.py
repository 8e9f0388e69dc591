"""Errors of runs, clusters, checkpoints and weights; those of data are in pipeline.errors.

`UserError` and its subclasses are for the user to fix: the command line prints them as one line and exits with 2.
`RunFailedError` is a run that could not continue: one line, exit code 1.
"""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from pipeline.errors import UserError


class DependencyError(UserError):
    """A version of a package that lacks what is used of its insides."""

    @classmethod
    def missing(cls, package: str, name: str, pinned: str) -> DependencyError:
        """What to say where the installed version lacks something that the pinned one has."""
        try:
            installed = version(package)
        except PackageNotFoundError:
            installed = "none"
        remedy = f"install the pinned version: pip install -c constraints.txt {package}"
        return cls(package, f"must have {name}, as version {pinned} has", installed, remedy)


class RecipeError(UserError):
    """A recipe that cannot be trained: unknown key, wrong type, impossible combination."""


class PortTakenError(RecipeError):
    """A port on which another process listens, which may be about to end."""

    @classmethod
    def of(cls, port: int, error: OSError) -> PortTakenError:
        """The error for a metrics port on which this process cannot listen."""
        rule = f"must be a port on which this process can listen ({os.strerror(error.errno or 0)})"
        return cls("metrics_port", rule, port, "choose another, or 0 for any free one")


class RunError(UserError):
    """A run that cannot be used as asked: unknown name, another recipe under the same name, already running."""


class ClusterError(UserError):
    """No Ray cluster to work on, or one that cannot be used as asked."""


class DeviceError(UserError):
    """A GPU that a rank must not train on, or that is not as it must be."""


class NotSharedError(UserError):
    """A folder on a local disk that not every node which uses it sees."""


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded: missing, altered, or of another model."""


class TraceError(UserError):
    """A trace that belongs to another run, or does not exist."""


class NotCommittedError(CheckpointError):
    """A final checkpoint that the store did not accept; the steps since the previous one can be repeated."""


class DamagedCheckpointError(CheckpointError):
    """A committed checkpoint that is not as it was written: a file is missing, truncated or altered."""


class HolderFullError(CheckpointError):
    """A memory checkpoint for which a node lacks memory; the run trains on without."""


class WeightsFileError(UserError):
    """A file of weights that cannot be used: missing, altered, unreadable, or of another model."""


class ExportError(UserError):
    """An export that cannot be made: an existing target, a missing package, a model that the format cannot hold."""


class EvaluationError(UserError):
    """An evaluation that cannot be made: a dataset without labels, classes that differ, too few samples."""


class ProbeDiedError(Exception):
    """A probe whose process died: killed, out of memory, or gone with its node."""


class TrackerError(UserError):
    """A tracker that cannot be written to: its library is missing."""


class AblationError(UserError):
    """An ablation that cannot be made as asked: an unknown key of its spec, a variant without a name of its own."""


class OvertakenError(RunError):
    """A driver that was silent too long, so that another one has taken over its run."""


class MonitorLivesError(RunError):
    """The monitor of an earlier driver, which Ray has yet to end."""


class PreflightError(Exception):
    """Nodes on which ranks must not start, by the checks before; a restart leaves them out."""


class RunFailedError(Exception):
    """A run that ended early; the message is the root cause in one line."""
