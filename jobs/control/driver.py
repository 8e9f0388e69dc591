"""The driver of a run: starts the monitor, and lets Ray Train run workers until the end.

What fails is restarted by Ray Train from the newest committed checkpoint; a failure that restarts cannot mend, or too
many without progress, end the run with the root cause.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

from jobs.cluster.session import Session
from jobs.control.failure_cause import root_cause
from jobs.control.lease import is_committed_to_the_end, overtaken
from jobs.control.milestones import MilestoneConsolidator
from jobs.control.monitor import MonitorConfig, RunMonitor
from jobs.control.run_plan import RunPlan
from jobs.errors import MonitorLivesError, OvertakenError, RunFailedError
from jobs.rank.trainer import TrainJob
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.run.directory import RunDirectory
from jobs.run.patience import persevere
from jobs.run.shared_folder import run_landmarks
from jobs.weights.target import ConsolidatedWeights
from pipeline.errors import ClaimedError, UserError
from pipeline.store.lease import Claim

logger = logging.getLogger(__name__)


def train(session: Session, plan: RunPlan, claim: Claim, on_status: Callable[[Mapping[str, Any]], None]) -> str:
    """Run `plan` on the connected cluster until it is `finished` or `stopped` (the outcome returned).

    SIGINT and SIGTERM stop it gracefully: a checkpoint is saved first.

    Args:
        session: Connected to a cluster.
        plan: From `plan_run`, claimed.
        claim: From `sole_driver`.
        on_status: Called about once a second with what the monitor says.

    Raises:
        OvertakenError: Another driver took over, since this one did not reach the store for too long.
        RunFailedError: With the root cause, if the run had to be given up.
    """
    import ray
    from ray.exceptions import RayError

    monitor = _start_monitor(session, plan, claim)
    weights = _consolidator(plan, monitor)
    failure: list[BaseException] = []
    fit = threading.Thread(target=_fit, args=(plan, claim, monitor, failure), name="ray-train", daemon=True)
    with _StopOnSignal(monitor):
        fit.start()
        while fit.is_alive():
            fit.join(timeout=1.0)
            try:
                claim.check()
                status: Any = ray.get(monitor.status.remote())
                weights.look(status.get("checkpoint_step"))
                on_status(status)
                if status["state"] == "stopping" and status["waiting"]:
                    break  # there are no ranks that could save
            except RayError:
                logger.warning("the run's monitor is being restarted")
            except ClaimedError as error:  # the run directory is the other's: nothing more may be written to it
                ray.kill(monitor)
                raise overtaken(plan.run, error) from None
    if failure:
        raise _failed(plan.run, claim, monitor, root_cause(failure[0])) from failure[0]
    outcome = "finished" if is_committed_to_the_end(plan) else "stopped"
    weights.finish(plan.schedule.total_steps if outcome == "finished" else None)
    ray.get(monitor.end.remote(outcome))
    on_status(ray.get(monitor.status.remote()))
    ray.kill(monitor)
    return outcome


def _start_monitor(session: Session, plan: RunPlan, claim: Claim) -> Any:
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError
    from ray.util import get_node_ip_address

    config = MonitorConfig(
        run=plan.run,
        schedule=plan.schedule,
        global_batch_size=plan.recipe.global_batch_size,
        max_restarts_without_progress=plan.recipe.max_restarts_without_progress,
        target_world_size=plan.recipe.max_workers,
        checkpoint_interval=IntervalRule.of(plan.recipe),
        device=plan.recipe.device,
        host="127.0.0.1" if session.is_local else get_node_ip_address(),  # type: ignore[no-untyped-call]
        hang_seconds=plan.recipe.hang_seconds,
        metrics_port=plan.recipe.metrics_port,
        targets_folder=str(session.stack.targets_dir) if session.is_local and session.stack else "",
    )
    patience_seconds = plan.run.storage.retry_seconds
    monitor = persevere(lambda: _new_monitor(plan.run, config, claim), MonitorLivesError, patience_seconds)
    import jobs.control.worker_group  # noqa: F401  as long as the monitor's process imports, too

    try:
        persevere(lambda: ray.get(monitor.status.remote()), ActorUnavailableError, patience_seconds)
    except RayActorError as error:  # what its constructor met: a port or a store that did not come back
        raise RunFailedError(f"the run's monitor could not start: {root_cause(error)}") from error
    return monitor


def _new_monitor(run: RunDirectory, config: MonitorConfig, claim: Claim) -> Any:
    """The actor, on this node; ends that of a driver before this one, which Ray may not have noticed to be dead.

    Raises:
        MonitorLivesError: It is not gone yet.
        OvertakenError: It is that of a driver that has taken the run over.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    name = f"monitor:{run.url}"
    actor: Any = ray.remote(RunMonitor)
    options = actor.options(name=name, num_cpus=0, max_restarts=-1, max_concurrency=4, scheduling_strategy=here)
    try:
        return options.remote(config)
    except ValueError as error:
        try:
            claim.beat()
            claim.check()
        except ClaimedError as lost:
            raise overtaken(run, lost) from None
        with contextlib.suppress(ValueError):  # it is gone meanwhile
            ray.kill(ray.get_actor(name))
        rule = "must be rid of the monitor of the driver before this one, which Ray is ending"
        raise MonitorLivesError("run", rule, run.name, "look at the cluster with `convmae doctor`") from error


def _consolidator(plan: RunPlan, monitor: Any) -> MilestoneConsolidator:
    """Writes the weights of milestones beside the training; what comes of it are events, never the run's end."""

    import ray
    from ray.exceptions import RayError

    def tell(method: Any, **facts: Any) -> None:
        with contextlib.suppress(RayError):  # a monitor that has just died misses the event, not the weights
            ray.get(method.remote(**facts))  # not waited for, it might be overtaken by the run's end

    def done(result: ConsolidatedWeights) -> None:
        tell(monitor.consolidated, step=result.step, url=result.url, size_bytes=result.bytes, seconds=result.seconds)

    def failed(step: int, error: str) -> None:
        tell(monitor.consolidation_failed, step=step, error=error)

    return MilestoneConsolidator(plan.run, done, failed)


def _fit(plan: RunPlan, claim: Claim, monitor: Any, failure: list[BaseException]) -> None:
    from jobs.control.worker_group import fit

    try:
        marks = run_landmarks(plan.recipe, plan.run, claim)
        fit(TrainJob(plan.recipe, plan.run, monitor, claim.number, claim.holder.text, plan.trace_url, marks))
    except BaseException as error:  # handed to the main thread, which raises it
        failure.append(error)


def _failed(run: RunDirectory, claim: Claim, monitor: Any, reason: str) -> OvertakenError | RunFailedError:
    """The end of a run that was given up, told to its monitor; or of this driver alone, if the run has another."""
    import ray
    from ray.exceptions import RayActorError

    try:
        ray.get(monitor.end.remote("failed", reason))
    except RayActorError:  # who takes over ends the monitor, also of a driver that cannot read yet that it has lost
        with contextlib.suppress(OSError, UserError):
            claim.beat()  # waits for a store that is away
        try:
            claim.check()
        except ClaimedError as error:
            return overtaken(run, error)
    return RunFailedError(reason)


class _StopOnSignal:
    """While active, the first SIGINT or SIGTERM asks the run to stop; a second SIGINT is not caught."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._stop)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self._monitor.request_stop.remote(signal.Signals(number).name)
