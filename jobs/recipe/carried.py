"""Variables of a shell that travel with a run to the processes that drive it: settings of trackers, and webhooks.

They may hold secrets. So they are in no recipe, command line or runtime environment, but travel as the store's keys do
(jobs.cluster.job_store).
"""

from __future__ import annotations

from collections.abc import Mapping

MLFLOW_PREFIX = "MLFLOW_"
WANDB_PREFIX = "WANDB_"
NOTIFY_PREFIX = "CONVMAE_NOTIFY_"
PREFIXES = (MLFLOW_PREFIX, WANDB_PREFIX, NOTIFY_PREFIX)


def carried_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of an environment that travel; an empty one counts as unset."""
    return {name: value for name, value in environ.items() if name.startswith(PREFIXES) and value}
