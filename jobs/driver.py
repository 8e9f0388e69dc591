"""The driver of a run: claims the run directory, starts the monitor, and lets Ray Train run workers until the end.

What fails is restarted by Ray Train from the newest committed checkpoint; a failure that restarts cannot mend, or too
many without progress, end the run with the root cause.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch

from jobs import checkpoint
from jobs.checkpoint import CLAIMS
from jobs.checkpoint_interval import IntervalRule
from jobs.errors import MonitorLivesError, OvertakenError, PortTakenError, RecipeError, RunError, RunFailedError
from jobs.failure_cause import root_cause
from jobs.initial_weights import pinned
from jobs.milestones import MilestoneConsolidator
from jobs.monitor import FLUSH_INTERVAL_SECONDS, MonitorConfig, RunMonitor
from jobs.patience import persevere
from jobs.recipe import URL_FIELDS, Recipe
from jobs.report import REPORT_NAME
from jobs.run_directory import RunDirectory
from jobs.schedule import Schedule
from jobs.session import Session
from jobs.shared_folder import check_seen_by_all, input_landmarks, planted, run_landmarks
from jobs.trace import check_trace
from jobs.trainer import TrainJob, order_of
from jobs.weight_results import Consolidated
from pipeline.claim import Claim, claimed, standing
from pipeline.errors import ClaimedError, UserError
from pipeline.manifest import Manifest
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

FINAL_STATES = frozenset({"finished", "stopped", "failed"})


@dataclass(frozen=True)
class RunPlan:
    """A run whose every input was found good; nothing was started or written yet."""

    recipe: Recipe
    run: RunDirectory
    schedule: Schedule
    trace_url: str = ""
    """Where to write what each rank consumes (jobs.trace); empty: nowhere."""
    patience_seconds: float = 0.0
    """How long its driver waits for a cluster that does not answer."""
    first_tar: str = ""
    """URL of a tar of the data set, which may lie elsewhere than the manifest."""


def plan_run(
    session: Session, recipe: Recipe, name: str, trace_url: str = "", *, drives: bool = True, is_patient: bool = False
) -> RunPlan:
    """Check everything that can be checked before anything starts.

    Args:
        session: Says which store and cluster.
        recipe: What to train.
        name: Of the run.
        trace_url: Where to write what each rank consumes; empty: nowhere.
        drives: Whether this process will be the driver; only on its machine does it matter whether a port is free.
        is_patient: Wait for store, port and cluster as long as the run itself would, instead of a few seconds. For
            drivers that nobody has typed.

    Raises:
        UserError: The first thing that is wrong: URL, credentials, data set, batch arithmetic, port.
    """
    if not recipe.data:
        raise RecipeError("data", "must be the URL of a data set", "", "make one with `convmae shard SOURCE URL`")
    recipe = recipe.amended(
        {name: url and Storage.absolute(url) for name in URL_FIELDS for url in [getattr(recipe, name)]}
    )
    run = session.run(name, recipe.run_root)
    patience_seconds = run.storage.retry_seconds if is_patient else 0.0
    session.storage.check(recipe.data, write=False, is_patient=is_patient)
    manifest = Manifest.load(session.storage, recipe.data)
    order = order_of(recipe, manifest.samples)
    _check_capacity(session, recipe)
    if drives or session.is_local:
        persevere(lambda: _check_port(recipe.metrics_port), PortTakenError, patience_seconds)
    session.storage.check(run.url, write=True, exclusive=True, is_patient=is_patient)
    session.remember_run_root(run.url.rpartition("/")[0])
    recipe = pinned(session.storage, recipe, run)
    run.check_recipe(recipe)
    if trace_url:
        trace_url = Storage.absolute(trace_url)
        check_trace(session.storage, trace_url, run.url)
    first_tar = next((entry.tar_url(recipe.data) for entry in manifest.shards), "")
    return RunPlan(recipe, run, Schedule.of(recipe, order.steps_per_epoch), trace_url, patience_seconds, first_tar)


def is_live(run: RunDirectory) -> bool:
    """Whether another driver works on the run: its heartbeat moves. Takes seconds only if a run was cut off."""
    first = run.read_heartbeat()
    if not first or first["state"] in FINAL_STATES:
        return False
    deadline = time.monotonic() + 3 * FLUSH_INTERVAL_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if run.read_heartbeat().get("updated_at_seconds") != first["updated_at_seconds"]:
            return True
    return False


@contextlib.contextmanager
def sole_driver(run: RunDirectory, on_wait: Callable[[str], None]) -> Iterator[Claim]:
    """Be the only driver of `run` while the context is open.

    A driver that died on this machine is known to be dead at once, one elsewhere when its lease was not renewed for
    pipeline.claim.DEAD_SECONDS.

    Args:
        run: Whose directory will be written to.
        on_wait: Told who is watched, where it must be seen whether a driver still lives.

    Raises:
        RunError: Another one lives; names it, and the age of its lease.
    """
    try:
        with claimed(run.storage, run.path(CLAIMS), "drives the run", on_wait=on_wait, keeps_number=True) as claim:
            yield claim
    except ClaimedError as error:
        raise RunError("run", error.rule, run.name, _ask_the_other(run)) from None


def _ask_the_other(run: RunDirectory) -> str:
    return f"watch it with `convmae status {run.name}`, end it with `convmae stop {run.name}`"


def check_folders(plan: RunPlan, claim: Claim) -> None:
    """Refuse folders on local disks that some node of the connected cluster which may have ranks does not see.

    Raises:
        NotSharedError: Names the nodes.
    """
    recipe, storage = plan.recipe, plan.run.storage
    kind, least = ("GPU", 1.0) if recipe.device == "cuda" else ("CPU", recipe.cpus_per_worker)
    with planted(storage, "trace", plan.trace_url) as trace:
        landmarks = (*run_landmarks(recipe, plan.run, claim), *input_landmarks(storage, recipe, plan.first_tar), *trace)
        check_seen_by_all(storage, landmarks, lambda resources: resources.get(kind, 0.0) >= least)


def claim_run(plan: RunPlan, *, is_sole_driver: bool = False) -> Literal["new", "resumes", "finished"]:
    """Take the run's name for this recipe; a run is finished when its last step is committed and its report written.

    Args:
        plan: The run.
        is_sole_driver: Whether this process is in `sole_driver`; else it is watched for seconds whether another one is.

    Raises:
        RunError: If the name belongs to another recipe, or another driver works on the run.
    """
    run = plan.run
    if run.check_recipe(plan.recipe):
        if _is_committed_to_the_end(plan) and run.storage.exists(run.path(REPORT_NAME)):
            return "finished"
        if not is_sole_driver and is_live(run):
            ruler = standing(run.storage, run.path(CLAIMS))
            held = f" ({ruler.text})" if ruler and not ruler.is_over else ""
            raise RunError("run", f"must not be running already{held}", run.name, _ask_the_other(run))
        run.take_stop_request()  # one that nobody heard is not meant for this attempt
    return "new" if run.claim(plan.recipe) else "resumes"


def _is_committed_to_the_end(plan: RunPlan) -> bool:
    steps = checkpoint.committed_steps(plan.run)
    return bool(steps) and steps[-1] >= plan.schedule.total_steps


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
                raise _overtaken(plan.run, error) from None
    if failure:
        raise _failed(plan.run, claim, monitor, root_cause(failure[0])) from failure[0]
    outcome = "finished" if _is_committed_to_the_end(plan) else "stopped"
    weights.finish(plan.schedule.total_steps if outcome == "finished" else None)
    ray.get(monitor.end.remote(outcome))
    on_status(ray.get(monitor.status.remote()))
    ray.kill(monitor)
    return outcome


def _overtaken(run: RunDirectory, error: ClaimedError) -> OvertakenError:
    remedy = f"this driver was silent for too long; {_ask_the_other(run)}"
    return OvertakenError("run", error.rule, run.name, remedy)


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
    import jobs.worker_group  # noqa: F401  as long as the monitor's process imports, too

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
            raise _overtaken(run, lost) from None
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

    def done(result: Consolidated) -> None:
        tell(monitor.consolidated, step=result.step, url=result.url, size_bytes=result.bytes, seconds=result.seconds)

    def failed(step: int, error: str) -> None:
        tell(monitor.consolidation_failed, step=step, error=error)

    return MilestoneConsolidator(plan.run, done, failed)


def _fit(plan: RunPlan, claim: Claim, monitor: Any, failure: list[BaseException]) -> None:
    from jobs.worker_group import fit

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
            remedy = f"this driver was silent for too long; {_ask_the_other(run)}"
            return OvertakenError("run", error.rule, run.name, remedy)
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


def _check_capacity(session: Session, recipe: Recipe) -> None:
    """Refuse what the local stack could never start; a cluster may still grow, so there a run waits."""
    if not session.is_local or session.stack is None:
        return
    if recipe.device == "cuda" and not torch.cuda.is_available():
        remedy = "set device=cpu precision=fp32, or submit to a cluster with RAY_ADDRESS"
        raise RecipeError("device", "must be cpu on a machine without a GPU", recipe.device, remedy)
    cpus = session.stack.settings.num_cpus or os.cpu_count() or 1
    if recipe.min_workers * recipe.cpus_per_worker > cpus:
        rule = f"must fit the local stack's {cpus} CPUs with min_workers = {recipe.min_workers}"
        remedy = f"set cpus_per_worker={cpus / recipe.min_workers:g} or less, or `convmae up --cpus N`"
        raise RecipeError("cpus_per_worker", rule, recipe.cpus_per_worker, remedy)


def _check_port(port: int) -> None:
    if port == 0:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            rule = f"must be a port that can be listened on ({os.strerror(error.errno or 0)})"
            raise PortTakenError("metrics_port", rule, port, "choose another, or 0 for any free one") from error
