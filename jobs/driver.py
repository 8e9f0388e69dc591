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
import tempfile
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
from jobs.consolidate import Consolidated
from jobs.errors import OvertakenError, RecipeError, RunError, RunFailedError
from jobs.initial_weights import pinned
from jobs.milestones import MilestoneConsolidator
from jobs.monitor import FLUSH_INTERVAL_SECONDS, MonitorConfig, RunMonitor
from jobs.recipe import Recipe
from jobs.report import REPORT_NAME
from jobs.run_directory import RunDirectory
from jobs.schedule import Schedule
from jobs.session import Session
from jobs.trace import check_trace
from jobs.trainer import TrainJob, order_of, train_worker
from jobs.wish import PAUSE_SECONDS
from pipeline.claim import Claim, claimed, standing
from pipeline.errors import ClaimedError, UnreachableError, UserError
from pipeline.manifest import Manifest
from pipeline.storage import Storage

logger = logging.getLogger(__name__)

FINAL_STATES = frozenset({"finished", "stopped", "failed"})
_URLS = ("data", "run_root", "init_from")
# Deaths that follow from another rank's: its peers see the connection break.
_COLLATERAL = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe")


@dataclass(frozen=True)
class RunPlan:
    """A run whose every input was found good; nothing was started or written yet."""

    recipe: Recipe
    run: RunDirectory
    schedule: Schedule
    trace_url: str = ""
    """Where to write what each rank consumes (jobs.trace); empty: nowhere."""


def plan_run(session: Session, recipe: Recipe, name: str, trace_url: str = "") -> RunPlan:
    """Check everything that can be checked before anything starts.

    Raises:
        UserError: The first thing that is wrong: URL, credentials, data set, batch arithmetic, port.
    """
    if not recipe.data:
        raise RecipeError("data", "must be the URL of a data set", "", "make one with `convmae shard SOURCE URL`")
    recipe = recipe.amended({name: url and Storage.absolute(url) for name in _URLS for url in [getattr(recipe, name)]})
    run = session.run(name, recipe.run_root)
    session.storage.check(recipe.data, write=False)
    manifest = Manifest.load(session.storage, recipe.data)
    order = order_of(recipe, manifest.samples)
    _check_capacity(session, recipe)
    _check_port(recipe.metrics_port)
    session.storage.check(run.url, write=True)
    recipe = pinned(session.storage, recipe, run)
    run.check_recipe(recipe)
    if trace_url:
        trace_url = Storage.absolute(trace_url)
        check_trace(session.storage, trace_url, run.url)
    return RunPlan(recipe, run, Schedule.of(recipe, order.steps_per_epoch), trace_url)


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


def claim_run(plan: RunPlan) -> Literal["new", "resumes", "finished"]:
    """Take the run's name for this recipe; a run is finished when its last step is committed and its report written.

    Raises:
        RunError: If the name belongs to another recipe, or another driver works on the run.
    """
    run = plan.run
    if run.check_recipe(plan.recipe):
        if _is_committed_to_the_end(plan) and run.storage.exists(run.path(REPORT_NAME)):
            return "finished"
        if is_live(run):
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

    monitor = _start_monitor(session, plan)
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
            except RayError:
                logger.warning("the run's monitor is being restarted")
            except ClaimedError as error:  # the run directory is the other's: nothing more may be written to it
                ray.kill(monitor)
                remedy = f"this driver was silent for too long; {_ask_the_other(plan.run)}"
                raise OvertakenError("run", error.rule, plan.run.name, remedy) from None
    if failure:
        reason = _root_cause(failure[0])
        ray.get(monitor.end.remote("failed", reason))
        raise RunFailedError(reason) from failure[0]
    outcome = "finished" if _is_committed_to_the_end(plan) else "stopped"
    weights.finish(plan.schedule.total_steps if outcome == "finished" else None)
    ray.get(monitor.end.remote(outcome))
    on_status(ray.get(monitor.status.remote()))
    ray.kill(monitor)
    return outcome


def _start_monitor(session: Session, plan: RunPlan) -> Any:
    import ray
    from ray.util import get_node_ip_address
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

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
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(RunMonitor)
    try:
        monitor = actor.options(
            name=f"monitor:{plan.run.url}", num_cpus=0, max_restarts=-1, max_concurrency=4, scheduling_strategy=here
        ).remote(config)
    except ValueError as error:
        remedy = f"watch it with `convmae status {plan.run.name}`"
        raise RunError("run", "must not be running already on this cluster", plan.run.name, remedy) from error
    ray.get(monitor.status.remote())
    return monitor


def _consolidator(plan: RunPlan, monitor: Any) -> MilestoneConsolidator:
    """Writes the weights of milestones beside the training; what comes of it are events, never the run's end."""

    def done(result: Consolidated) -> None:
        monitor.consolidated.remote(step=result.step, url=result.url, size_bytes=result.bytes, seconds=result.seconds)

    def failed(step: int, error: str) -> None:
        monitor.consolidation_failed.remote(step=step, error=error)

    return MilestoneConsolidator(plan.run, done, failed)


def _fit(plan: RunPlan, claim: Claim, monitor: Any, failure: list[BaseException]) -> None:
    """Ray Train's loop; in a thread, since on the main thread it would take SIGINT for itself."""
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig

    # Ray Train looks after its workers this often, and restarts them no sooner than it has noticed.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    recipe = plan.recipe
    elastic = recipe.min_workers != recipe.max_workers
    workers = (recipe.min_workers, recipe.max_workers) if elastic else recipe.max_workers
    resources = {"CPU": recipe.cpus_per_worker} | ({"GPU": 1.0} if recipe.device == "cuda" else {})
    job = TrainJob(recipe, plan.run, monitor, claim.number, claim.holder.text, plan.trace_url)
    with tempfile.TemporaryDirectory(prefix="convmae-ray-train-") as folder:
        # Typed as Any: Ray 2.60 annotates TorchTrainer with the configs of Train v1.
        run_config: Any = RunConfig(
            name=plan.run.name,
            storage_path=folder,  # Ray's own bookkeeping; checkpoints are ours
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[failure_reporter(monitor), save_before_resizes(monitor)],
            logging_config=LoggingConfig(log_level="ERROR"),
        )
        scaling_config: Any = ScalingConfig(
            num_workers=workers,
            use_gpu=recipe.device == "cuda",
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=recipe.resize_seconds,
        )
        trainer = TorchTrainer(lambda: train_worker(job), scaling_config=scaling_config, run_config=run_config)
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread, which raises it
            failure.append(error)


def failure_reporter(monitor: Any) -> Any:
    """The callback by which Ray Train's controller tells the monitor why a worker group ended, and asks to go on."""
    from ray.train import UserCallback

    class FailureReporter(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            import ray

            for rank, exception in sorted(worker_exceptions.items()):
                logger.error("rank %d failed: %s", rank, exception)
            error, fatal = describe_failure(worker_exceptions)
            if given_up := ray.get(monitor.worker_failed.remote(error, fatal)):
                raise RunFailedError(given_up)

    return FailureReporter()


def save_before_resizes(monitor: Any) -> Any:
    """The callback by which Ray Train's controller has the ranks save before it resizes their group, or a node goes.

    Ray Train has no public hook for either; these are of its developer API.
    """
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2._internal.execution.controller.state import PreemptingState

    class SaveBeforeResizes(ControllerCallback):
        def before_controller_execute_failure_decision(self, failure_decision: Any) -> None:  # noqa: ARG002
            import ray

            ray.get(monitor.group_ended.remote())

        def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
            import ray

            if not ray.get(monitor.pause.remote(PAUSE_SECONDS)):
                logger.info("a group of %d workers starts from the newest commit", resize_decision.num_workers)

        def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
            if isinstance(current_state, PreemptingState) and not isinstance(previous_state, PreemptingState):
                info = current_state.preemption_info
                seconds = None if info.deadline_ms is None else info.deadline_ms / 1e3 - time.time()
                monitor.drain.remote(info.preempted_ranks, seconds)

    return SaveBeforeResizes()


def describe_failure(worker_exceptions: Mapping[int, Exception]) -> tuple[str, bool]:
    """The root cause among the errors of a worker group, in one line, and whether no restart can mend it.

    When one rank dies its peers fail too, in their collectives; those are named only if there is nothing else.
    """
    causes = {rank: _cause(error) for rank, error in worker_exceptions.items()}
    fatal = any(_is_fatal(cause) for cause in causes.values())

    def suspicion(rank: int) -> int:
        cause, text = causes[rank], str(causes[rank]).lower()
        if isinstance(cause, UserError):
            return 0
        return 2 if any(word in text for word in _COLLATERAL) else 1

    rank = min(sorted(causes), key=suspicion)
    lines = str(causes[rank]).strip().splitlines() or [""]
    return f"rank {rank}: {type(causes[rank]).__name__}: {lines[0]}", fatal


def _is_fatal(cause: BaseException) -> bool:
    """Whether a restart meets the same again; an object store that is away may come back."""
    return isinstance(cause, UserError) and not isinstance(cause, UnreachableError)


def _cause(error: BaseException) -> BaseException:
    """What Ray Train and Ray wrapped."""
    for attribute in ("health_check_failure", "_base_exc", "cause", "__cause__"):
        inner = getattr(error, attribute, None)
        if isinstance(inner, BaseException):
            return _cause(inner)
    return error


def _root_cause(error: BaseException) -> str:
    """The reason that the reporter gave, if Ray Train wrapped it; else the error's own last line."""
    current: BaseException | None = error
    while current is not None:
        if isinstance(current, RunFailedError):
            return str(current)
        current = getattr(current, "controller_failure", None) or current.__cause__
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1]


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
            raise RecipeError("metrics_port", rule, port, "choose another, or 0 for any free one") from error
