"""Simulation of a run on nodes that fail, by discrete events, and the checkpoint interval that suits them.

What is simulated is what the driver does. Any change of the nodes in use ends the worker group; a new one starts
after `restart_seconds` from the newest checkpoint. The elastic policy trains on every available node, in time
that shrinks with their number; the fixed policy waits until all are available. Failures of a node
are exponential, and a failed node is replaced after a fixed time.

With memory checkpoints a restart begins at the newest of them. The part of a node has its copy on the next one, so they
are lost with two neighbours: where a node fails before the group that a failure before it left has made new copies.

Sources: Young 1974, doi:10.1145/361147.361115; Daly 2006, doi:10.1016/j.future.2004.11.016.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from jobs.terminal import duration_text
from pipeline.errors import UserError

Policy = Literal["fixed", "elastic"]
POLICIES: tuple[Policy, ...] = ("fixed", "elastic")
MAX_IDLE_EVENTS = 200_000
"""Failures and arrivals without a new checkpoint after which a run is abandoned."""


class NoHeadwayError(UserError):
    """A run that never ends: its nodes fail before it reaches its next checkpoint."""


@dataclass(frozen=True)
class Scenario:
    """A run, its nodes, and how they fail."""

    steps: int
    step_seconds: float
    """Of one step on all nodes, the mean of all steps; on fewer it takes proportionally longer."""
    nodes: int
    min_nodes: int
    """Fewest that the elastic policy trains with."""
    mtbf_seconds: float
    """Mean time between failures of one node."""
    replace_seconds: float
    """From a failure until another node is available."""
    restart_seconds: float
    """From a change of the nodes until the first step; includes the detection of a failure."""
    stall_seconds: float
    """How long training pauses for one checkpoint."""
    interval_steps: int
    """Steps between checkpoints."""
    gpus_per_node: int = 1
    memory_interval_steps: int = 0
    """Steps between memory checkpoints, whose cost is part of `step_seconds`; 0: none."""

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            UserError: Naming the first that is impossible.
        """
        for name in ("steps", "step_seconds", "nodes", "min_nodes", "mtbf_seconds", "interval_steps", "gpus_per_node"):
            if not getattr(self, name) > 0:
                raise UserError(name, "must be above 0", getattr(self, name), "give a larger one")
        for name in ("replace_seconds", "restart_seconds", "stall_seconds", "memory_interval_steps"):
            if not getattr(self, name) >= 0:
                raise UserError(name, "must be at least 0", getattr(self, name), "give a larger one")
        if self.min_nodes > self.nodes:
            raise UserError("min_nodes", f"must be at most nodes = {self.nodes}", self.min_nodes, "give a smaller one")

    @property
    def ideal_seconds(self) -> float:
        """Wall-clock without failures, checkpoints and restarts."""
        return self.steps * self.step_seconds

    @property
    def group_mtbf_seconds(self) -> float:
        """Mean time between failures of any of all nodes."""
        return self.mtbf_seconds / self.nodes


@dataclass(frozen=True)
class Outcome:
    """One simulated run, or the mean of several."""

    wall_seconds: float
    goodput: float
    """Ideal wall-clock, divided by that of the run."""
    lost_steps: float
    """Steps that were redone, since no checkpoint held them."""
    restarts: float
    store_restarts: float
    """Of these, those for which no memory checkpoint was left."""
    waited_seconds: float
    """With too few nodes to train."""
    gpu_hours: float
    """Of all available nodes, training or not."""


def simulate(scenario: Scenario, policy: Policy, rng: random.Random) -> Outcome:
    """Run `scenario` once.

    Args:
        scenario: What happens, in distribution.
        policy: `fixed` trains on all nodes or waits, `elastic` on those that are available.
        rng: Draws the failures.

    Raises:
        NoHeadwayError: Nodes fail before a checkpoint is reached.
    """
    run = _SimulatedRun(scenario, policy, rng)
    while not run.is_done:
        if run.idle_events >= MAX_IDLE_EVENTS:
            done = f"{run.stored:,} of {scenario.steps:,} steps after {run.now / 86_400:,.0f} days"
            remedy = "save more often, or use nodes that fail less"
            raise NoHeadwayError(
                "interval_steps", f"must let the run make headway ({done})", scenario.interval_steps, remedy
            )
        run.advance()
    return run.outcome


class _SimulatedRun:
    """One run on nodes that fail, from one failure or arrival of a node to the next."""

    def __init__(self, scenario: Scenario, policy: Policy, rng: random.Random) -> None:
        self._scenario, self._rng = scenario, rng
        self._least = scenario.nodes if policy == "fixed" else scenario.min_nodes
        self._alive, self._arrivals = scenario.nodes, list[float]()
        self._lost, self._restarts, self._waited, self._node_seconds = 0.0, -1, 0.0, 0.0
        self._store_restarts = 0
        self._held = 0
        """Steps that the newest memory checkpoint has; those in the store where there is none."""
        self._is_copied = False
        """Whether two nodes have each part of it."""
        self.now, self.stored, self.idle_events = 0.0, 0, 0

    @property
    def is_done(self) -> bool:
        return self.stored >= self._scenario.steps

    @property
    def outcome(self) -> Outcome:
        hours = self._node_seconds * self._scenario.gpus_per_node / 3600
        goodput = self._scenario.ideal_seconds / self.now
        return Outcome(self.now, goodput, self._lost, self._restarts, self._store_restarts, self._waited, hours)

    def advance(self) -> None:
        """Advance to the next event, or to the end of the run before it."""
        self.idle_events += 1
        rate = self._alive / self._scenario.mtbf_seconds
        failure = self.now + self._rng.expovariate(rate) if rate else math.inf
        event = min(failure, self._arrivals[0]) if self._arrivals else failure
        if self._alive < self._least:
            self._waited += event - self.now
        elif event > self.now:
            self._train(event - self.now)
            if self.is_done:
                return
        self._pass(event - self.now, event)
        if self._arrivals and event == self._arrivals[0]:
            heapq.heappop(self._arrivals)
            self._alive += 1
        else:
            heapq.heappush(self._arrivals, event + self._scenario.replace_seconds)
            self._fail()
            self._alive -= 1

    def _train(self, seconds: float) -> None:
        """Train for `seconds`, restart included, or until all steps are done."""
        scenario, begin = self._scenario, self._held
        self._restarts += 1
        self._store_restarts += self._restarts > 0 and not scenario.memory_interval_steps
        stretch = _trained(scenario, self._alive, seconds - scenario.restart_seconds, begin)
        if stretch.stored > self.stored:
            self.stored, self.idle_events = stretch.stored, 0
        every = scenario.memory_interval_steps
        self._held = max(self.stored, begin, int(stretch.done // every) * every if every else 0)
        self._is_copied = self._is_copied or self._held > begin
        self._lost += stretch.done - self._held
        if self.is_done:
            needed = scenario.restart_seconds + stretch.seconds
            self._pass(needed, self.now + needed)

    def _fail(self) -> None:
        """A node fails: its part is read from its neighbour, unless that has lost it with the failure before."""
        if not self._scenario.memory_interval_steps:
            return
        others = self._alive - 1
        if others == 0 or (not self._is_copied and self._rng.random() < 2 / others):
            self._lost += self._held - self.stored
            self._held, self._store_restarts = self.stored, self._store_restarts + 1
        self._is_copied = False

    def _pass(self, seconds: float, until: float) -> None:
        self._node_seconds += self._alive * seconds
        self.now = until


@dataclass(frozen=True)
class _Stretch:
    stored: int
    """Steps that the newest checkpoint in the store has; 0 if none was saved."""
    done: float
    """Steps of the run that were done at the end."""
    seconds: float
    """Until all steps were done; 0 if they were not."""


def _trained(scenario: Scenario, nodes: int, seconds: float, begin: int) -> _Stretch:
    """What a worker group that begins after `begin` steps gets done in `seconds`."""
    step_seconds = scenario.step_seconds * scenario.nodes / nodes
    every, steps = scenario.interval_steps, scenario.steps
    saves = -(-steps // every) - begin // every
    needed = (steps - begin) * step_seconds + saves * scenario.stall_seconds
    if seconds >= needed:
        return _Stretch(steps, steps, needed)
    left, at, stored = max(0.0, seconds), begin, 0
    first = every - begin % every
    if left >= (first_seconds := first * step_seconds + scenario.stall_seconds):
        intervals, left = divmod(left - first_seconds, every * step_seconds + scenario.stall_seconds)
        stored = at = begin + first + int(intervals) * every
        first = every
    return _Stretch(stored, min(at + min(left / step_seconds, first), steps), 0.0)


def mean_outcome(scenario: Scenario, policy: Policy, *, trials: int, seed: int) -> Outcome:
    """The mean of `trials` simulated runs; the same numbers give the same mean."""
    outcomes = [simulate(scenario, policy, random.Random(f"{seed}-{trial}")) for trial in range(trials)]
    columns: Sequence[str] = tuple(Outcome.__dataclass_fields__)
    return Outcome(**{name: fmean(getattr(outcome, name) for outcome in outcomes) for name in columns})


def daly_interval_seconds(stall_seconds: float, mtbf_seconds: float) -> float:
    """The cheapest time between checkpoints by Daly's estimate (equation 37), without the stall itself.

    Young's sqrt(2 * stall * MTBF) is its first term. The duration of a restart matters only through the MTBF,
    which covers all time in which a failure can come: in the whole model (equation 20) it is a factor of the
    wall-clock. The MTBF + restart under the root of Daly's first-order form is that sum, for an MTBF of training alone.
    """
    if stall_seconds >= 2 * mtbf_seconds:
        return mtbf_seconds
    ratio = stall_seconds / (2 * mtbf_seconds)
    young = math.sqrt(2 * stall_seconds * mtbf_seconds)
    return young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall_seconds


def best_interval_steps(scenario: Scenario) -> int:
    """Daly's interval in steps: at least one, at most the whole run."""
    seconds = daly_interval_seconds(scenario.stall_seconds, scenario.group_mtbf_seconds)
    return max(1, min(scenario.steps, round(seconds / scenario.step_seconds)))


@dataclass(frozen=True)
class Prediction:
    """What one policy makes of a scenario at one interval."""

    policy: Policy
    interval_steps: int
    memory_interval_steps: int
    outcome: Outcome | None
    """None if it never ends, since nodes fail before a checkpoint is reached."""


def predictions(scenario: Scenario, *, trials: int, seed: int) -> list[Prediction]:
    """Every policy at the scenario's interval, and at the best one if that differs; without memory checkpoints, too."""
    intervals = dict.fromkeys((scenario.interval_steps, best_interval_steps(scenario)))
    memory = dict.fromkeys((0, scenario.memory_interval_steps))
    found = []
    for policy, steps, held in itertools.product(POLICIES, intervals, memory):
        outcome = None
        case = replace(scenario, interval_steps=steps, memory_interval_steps=held)
        with suppress(NoHeadwayError):
            outcome = mean_outcome(case, policy, trials=trials, seed=seed)
        found.append(Prediction(policy, steps, held, outcome))
    return found


def scenario_lines(
    markets: Mapping[str, Scenario], parts: Sequence[tuple[str, int, float]], *, is_estimate: bool
) -> Iterator[tuple[str, str]]:
    """What is simulated, and the cheapest interval, as fields and values for people.

    Args:
        markets: The run on nodes of each kind, which differ in how they fail.
        parts: The run's steps by the size of their images: the size, how many steps, and seconds of each.
        is_estimate: Whether the time of a step is an estimate rather than measured.
    """
    first = next(iter(markets.values()))
    source = " (an estimate for H100 GPUs: --step-seconds)" if is_estimate else ""
    mean = " on average" if len(parts) > 1 else ""
    yield "steps", f"{first.steps:,} of {first.step_seconds:.3g} s{mean} on {first.nodes:,} nodes{source}"
    if len(parts) > 1:
        for size, steps, seconds in parts:
            yield f"  {size}", f"{steps:,} of {seconds:.3g} s"
    yield "without failures", duration_text(first.ideal_seconds)
    for market, scenario in markets.items():
        best = best_interval_steps(scenario)
        yield market, f"any of the nodes fails every {duration_text(scenario.group_mtbf_seconds)}"
        yield "  checkpoints", f"every {scenario.interval_steps:,} steps, {scenario.stall_seconds:g} s each"
        if scenario.memory_interval_steps:
            yield "  in memory", f"every {scenario.memory_interval_steps:,} steps"
        yield "  best interval", f"{best:,} steps ({duration_text(best * scenario.step_seconds)}), by Young and Daly"


def prediction_row(prediction: Prediction) -> tuple[str, ...]:
    """Policy, both intervals, wall-clock, goodput, lost steps, restarts, waiting and GPU hours, for people."""
    outcome = prediction.outcome
    case = (prediction.policy, f"{prediction.interval_steps:,}", f"{prediction.memory_interval_steps or '-':}")
    if outcome is None:
        return (*case, "never ends")
    return (
        *case,
        duration_text(outcome.wall_seconds),
        f"{outcome.goodput:.1%}",
        f"{outcome.lost_steps:,.0f}",
        f"{outcome.restarts:,.1f}",
        duration_text(outcome.waited_seconds),
        f"{outcome.gpu_hours:,.0f}",
    )
