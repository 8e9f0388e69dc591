"""What can go wrong in a run, on top of what can be wrong with data (pipeline.errors).

`UserError` and its children are the user's to mend: the command line prints them as one line and exits 2.
`RunFailedError` is a run that could not go on: one line, exit 1.
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
    """A port that another process listens on, which may be about to end."""

    @classmethod
    def of(cls, port: int, error: OSError) -> PortTakenError:
        """What to tell of a metrics port that cannot be listened on."""
        rule = f"must be a port that can be listened on ({os.strerror(error.errno or 0)})"
        return cls("metrics_port", rule, port, "choose another, or 0 for any free one")


class RunError(UserError):
    """A run that cannot be addressed as asked: unknown name, other recipe under the same name, already running."""


class ClusterError(UserError):
    """No Ray cluster to work on, or not the one that was asked for."""


class NotSharedError(UserError):
    """A folder on a local disk that not every node which works on it sees."""


class CheckpointError(UserError):
    """A checkpoint that cannot be loaded: missing, altered, or of another model."""


class TraceError(UserError):
    """A trace that is another run's, or that is not there."""


class NotCommittedError(CheckpointError):
    """A last checkpoint that the store did not take; the steps since the one before can be done again."""


class DamagedCheckpointError(CheckpointError):
    """A committed checkpoint that is not as it was written: a file is missing, truncated or altered."""


class WeightsFileError(UserError):
    """A file of weights that cannot be taken: missing, altered, unreadable, or of another model."""


class ExportError(UserError):
    """An export that cannot be made: a target that exists, a package that is missing, a model that the format lacks."""


class OvertakenError(RunError):
    """A driver that was silent for too long and finds that another one has taken over its run."""


class MonitorLivesError(RunError):
    """The monitor of a driver before this one, which Ray has yet to end."""


class RunFailedError(Exception):
    """A run that ended early; the message is the root cause in one line."""
