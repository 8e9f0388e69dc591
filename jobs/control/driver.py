"""The driver of a run: starts the monitor, and lets Ray Train run workers until the end.

What fails is restarted by Ray Train from the newest committed checkpoint; a failure that restarts cannot fix, or too
many without progress, end the run with the root cause.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any

from jobs.cluster.ray_internals.table import check_ray
from jobs.cluster.session import Session
from jobs.consolidation.target import ConsolidatedWeights
from jobs.control.lease import is_committed_to_the_end, overtaken
from jobs.control.milestones import MilestoneConsolidator
from jobs.control.run_plan import RunPlan
from jobs.errors import DependencyError, MonitorLivesError, OvertakenError, RunFailedError
from jobs.monitor.failure_cause import root_cause
from jobs.monitor.monitor import RunMonitor
from jobs.monitor.run_memory import MonitorConfig
from jobs.notices.webhook import Webhook
from jobs.probes.probe_tasks import ProbeTasks
from jobs.probes.prober import Prober
from jobs.rank.trainer import TrainJob
from jobs.recipe.checkpoint_interval import IntervalRule
from jobs.run.directory import RunDirectory
from jobs.run.patience import persevere
from jobs.run.shared_folder import run_landmarks
from jobs.trackers.trackers import TrackerSettings
from pipeline.errors import LeaseHeldError, UserError
from pipeline.store.lease import Lease

logger = logging.getLogger(__name__)


def train(session: Session, plan: RunPlan, lease: Lease, on_status: Callable[[Mapping[str, Any]], None]) -> str:
    """Run `plan` on the connected cluster until it is `finished` or `stopped` (the outcome returned).

    SIGINT and SIGTERM stop it gracefully: a checkpoint is saved first.

    Args:
        session: Connected to a cluster.
        plan: From `plan_run`, claimed.
        lease: From `sole_driver`.
        on_status: Called about once a second with what the monitor says.

    Raises:
        OvertakenError: Another driver took over, since this one did not reach the store for too long.
        RunFailedError: With the root cause, if the run had to be given up.
    """
    monitor = _start_monitor(session, plan, lease)
    return drive(plan, lease, monitor, lambda: _fit(plan, lease, monitor), on_status)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor)


def drive(
    plan: RunPlan,
    lease: Lease,
    monitor: Any,
    fit: Callable[[], None],
    on_status: Callable[[Mapping[str, Any]], None],
    *,
    kill: Callable[[Any], None] = _kill,
) -> str:
    """`train`, for a run whose monitor lives.

    Args:
        plan: As for `train`.
        lease: As for `train`.
        monitor: Its handle.
        fit: Trains to the end, on a thread of its own.
        on_status: As for `train`.
        kill: Ends the monitor.
    """
    import ray

    prober = _prober(plan, monitor)
    weights = _consolidator(plan, monitor, prober)
    training = _Training(fit)
    with _StopOnSignal(monitor):
        training.start()
        try:
            for status in _statuses(training, lease, monitor):
                weights.look(status.get("checkpoint_step"))
                if prober and status["state"] == "running":
                    prober.begin()
                on_status(status)
                if status["state"] == "stopping" and status["waiting"]:
                    break  # there are no ranks that could save
        except LeaseHeldError as error:  # the run directory is the other's: nothing more may be written to it
            kill(monitor)
            raise overtaken(plan.run, error) from None
    if training.failure:
        raise _failed(plan.run, lease, monitor, root_cause(training.failure)) from training.failure
    is_finished = is_committed_to_the_end(plan)
    if is_finished:
        ray.get(monitor.trained.remote())
    weights.finish(plan.schedule.total_steps if is_finished else None)
    if prober and is_finished:
        _await_probes(prober, plan, lease, monitor, on_status)
    elif prober:
        prober.leave()
    on_status(_final_status(monitor, outcome := "finished" if is_finished else "stopped"))
    kill(monitor)
    return outcome


def _final_status(monitor: Any, outcome: str) -> Mapping[str, Any]:
    import ray

    ray.get(monitor.end.remote(outcome))
    status: Mapping[str, Any] = ray.get(monitor.status.remote())
    return status


class _Training(threading.Thread):
    """The thread in which Ray Train works, and what it ended with."""

    def __init__(self, fit: Callable[[], None]) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._fit = fit
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._fit()
        except BaseException as error:  # for the main thread, which raises it
            self.failure = error


def _await_probes(
    prober: Prober, plan: RunPlan, lease: Lease, monitor: Any, on_status: Callable[[Mapping[str, Any]], None]
) -> None:
    """Until all probes of a finished training are made, the recipe's limit has passed, or somebody asks to stop."""
    began, limit_seconds = time.monotonic(), plan.recipe.probe_wait_seconds
    prober.close()
    reason = f"the end of the run waited {limit_seconds:g} s for it (probe_wait_seconds)"
    with _StopOnSignal(monitor):
        try:
            for status in _statuses(prober.thread, lease, monitor):
                on_status({**status, "probes_left": len(prober.left)})
                if status["state"] == "stopping":
                    reason = "the run was asked to stop before it"
                    break
                if time.monotonic() - began >= limit_seconds:
                    break
        except LeaseHeldError as error:
            _kill(monitor)
            raise overtaken(plan.run, error) from None
    prober.give_up(f"{reason}; `convmae evaluate {plan.run.name}@STEP` measures it")


def _statuses(work: threading.Thread, lease: Lease, monitor: Any) -> Iterator[Mapping[str, Any]]:
    """What the monitor says, about once a second while a thread works.

    Raises:
        LeaseHeldError: Another driver has taken the run over.
    """
    import ray
    from ray.exceptions import RayError

    while work.is_alive():
        work.join(timeout=1.0)
        lease.check()
        try:
            status: Mapping[str, Any] = ray.get(monitor.status.remote())
        except RayError:
            logger.warning("the run's monitor is being restarted")
            continue
        yield status


def _start_monitor(session: Session, plan: RunPlan, lease: Lease) -> Any:
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
        straggler_factor=plan.recipe.straggler_factor,
        leave_out_stragglers=plan.recipe.leave_out_stragglers,
        metrics_port=plan.recipe.metrics_port,
        targets_folder=str(session.stack.targets_dir) if session.is_local and session.stack else "",
        trackers=TrackerSettings.of(plan.recipe, session.environ),
        webhook=Webhook.of(plan.recipe.to_json(), session.environ, plan.run),
        claim=lease.number,
    )
    patience_seconds = plan.run.storage.retry_seconds
    monitor = persevere(lambda: _new_monitor(plan.run, config, lease), MonitorLivesError, patience_seconds)
    try:
        check_ray()
    except DependencyError:
        ray.kill(monitor)
        raise
    import jobs.control.worker_group  # noqa: F401  as long as the monitor's process imports, too

    try:
        persevere(lambda: ray.get(monitor.status.remote()), ActorUnavailableError, patience_seconds)
    except RayActorError as error:  # what its constructor met: a port or a store that did not come back
        raise RunFailedError(f"the run's monitor could not start: {root_cause(error)}") from error
    return monitor


def _new_monitor(run: RunDirectory, config: MonitorConfig, lease: Lease) -> Any:
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
            lease.beat()
            lease.check()
        except LeaseHeldError as lost:
            raise overtaken(run, lost) from None
        with contextlib.suppress(ValueError):  # it is gone meanwhile
            ray.kill(ray.get_actor(name))
        rule = "must be rid of the monitor of the driver before this one, which Ray is ending"
        raise MonitorLivesError("run", rule, run.name, "look at the cluster with `convmae doctor`") from error


def _prober(plan: RunPlan, monitor: Any) -> Prober | None:
    """Measures the encoder beside the training; what comes of it are events, never the run's end."""
    import ray
    from ray.exceptions import RayActorError, RayError

    if plan.probes is None:
        return None

    def report(method: str, step: int, about: Any) -> None:
        with contextlib.suppress(RayError):  # of a monitor that does not come back the run itself dies
            patience_seconds = plan.run.storage.retry_seconds
            persevere(lambda: ray.get(getattr(monitor, method).remote(step, about)), RayActorError, patience_seconds)

    def done(step: int, fields: Mapping[str, Any]) -> None:
        report("probed", step, fields)

    def failed(step: int, error: str) -> None:
        report("probe_failed", step, error)

    tasks = ProbeTasks(plan.run, plan.probes)
    return Prober(plan.run, plan.probes, tasks, done, failed, hurry=tasks.hurry)


def _consolidator(plan: RunPlan, monitor: Any, prober: Prober | None) -> MilestoneConsolidator:
    """Writes the weights of milestones beside the training; what comes of it are events, never the run's end."""

    import ray
    from ray.exceptions import RayError

    def report(method: Any, **facts: Any) -> None:
        with contextlib.suppress(RayError):  # a monitor that has just died misses the event, not the weights
            ray.get(method.remote(**facts))  # not waited for, it might be overtaken by the run's end

    def done(result: ConsolidatedWeights) -> None:
        report(monitor.consolidated, step=result.step, url=result.url, size_bytes=result.bytes, seconds=result.seconds)

    def failed(step: int, error: str) -> None:
        report(monitor.consolidation_failed, step=step, error=error)

    return MilestoneConsolidator(plan.run, done, failed, prober)


def _fit(plan: RunPlan, lease: Lease, monitor: Any) -> None:
    from jobs.control.worker_group import fit

    marks = run_landmarks(plan.recipe, plan.run, lease)
    fit(TrainJob(plan.recipe, plan.run, monitor, lease.number, lease.holder.text, plan.trace_url, marks))


def _failed(run: RunDirectory, lease: Lease, monitor: Any, reason: str) -> OvertakenError | RunFailedError:
    """The error of a run that was given up, which its monitor is told; of this driver alone, if the run has another."""
    import ray
    from ray.exceptions import RayActorError

    try:
        ray.get(monitor.end.remote("failed", reason))
    except RayActorError:  # who takes over ends the monitor, also of a driver that cannot read yet that it has lost
        with contextlib.suppress(OSError, UserError):
            lease.beat()  # waits for a store that is unreachable
        try:
            lease.check()
        except LeaseHeldError as error:
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
