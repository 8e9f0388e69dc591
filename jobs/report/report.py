"""The report of a run: one HTML file that needs nothing beside it, for a screen, a phone, paper and a dark room.

It is written from the run directory alone, at any time: a run that is still training, was cut off or never made a step
reports what there is. The same directory gives the same bytes.
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from string import Template
from typing import Any

from jobs.checkpoint import checkpoint
from jobs.checkpoint.checkpoint import Commit
from jobs.metrics.goodput import measured_goodput
from jobs.recipe.recipe import Recipe
from jobs.report.charts import CANVASES, History, training_chart
from jobs.report.page import PAGE
from jobs.report.reconstruction import RECONSTRUCTIONS_NAME
from jobs.run.directory import REPORT_NAME, RunDirectory
from jobs.terminal import duration_text
from pipeline.shard.manifest import SKIPPED_NAME
from pipeline.store.json_text import parsed_object

MOST_ATTEMPTS = 400
"""Newest events of attempts that are listed."""
MOST_CHECKPOINTS = 40
"""Newest checkpoints that are listed, beside those that still exist."""
MOST_FAULTS = 50
"""Samples found unusable that are named."""
MOST_BARS = 60
"""Newest attempts that the timeline shows; narrower bars could not be told apart on a phone."""
MOST_SKIPPED = 20
"""Skipped images that are named."""
_ENDINGS = frozenset({"finished", "stopped", "failed"})


@dataclass(frozen=True)
class RunRecord:
    """All that a report tells of."""

    name: str
    url: str
    recipe: Recipe
    heartbeat: Mapping[str, Any]
    """Empty before the run first started."""
    events: Sequence[Mapping[str, Any]]
    history: History
    kept_steps: frozenset[int]
    """Checkpoints that exist now."""
    commit: Commit | None
    """The newest of them."""
    faults: Sequence[Mapping[str, Any]]
    """Samples that the run found unusable, in the order in which it found them."""
    skipped: Sequence[Mapping[str, str]] | None
    """Images that the data set left out; None where its list is gone."""
    picture: bytes | None
    """A PNG of reconstructions."""

    @classmethod
    def read(cls, run: RunDirectory) -> RunRecord:
        """Read everything from storage.

        Raises:
            RunError: If there is no such run.
        """
        recipe = run.read_recipe()
        skipped = _read_or_none(run, run.storage.join(recipe.data, SKIPPED_NAME)) if recipe.data else None
        return cls(
            name=run.name,
            url=run.url,
            recipe=recipe,
            heartbeat=run.read_heartbeat(),
            events=run.read_events(),
            history=History.of(run.read_history()),
            kept_steps=frozenset(checkpoint.committed_steps(run)),
            commit=checkpoint.latest_commit(run),
            faults=run.read_quarantine(),
            skipped=None if skipped is None else list(_skipped_rows(skipped)),
            picture=_read_or_none(run, run.path(RECONSTRUCTIONS_NAME)),
        )

    @property
    def state(self) -> str:
        """What the run last said it was doing."""
        return str(self.heartbeat.get("state", "not started"))

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self.heartbeat.get("step", 0))

    @property
    def ending(self) -> str:
        """Why the run ended early; empty if it did not."""
        if self.state not in ("stopped", "failed"):
            return ""
        return next((str(event["reason"]) for event in reversed(self.events) if event["kind"] == self.state), "")

    @property
    def heard_at(self) -> float:
        """When the run last said something, as Unix time; 0 where it never did."""
        said = self.events[-1]["at_seconds"] if self.events else 0.0
        return float(self.heartbeat.get("updated_at_seconds", said))

    @property
    def attempts(self) -> list[Mapping[str, Any]]:
        """The events that began an attempt."""
        return [event for event in self.events if "steps_redone" in event]


def write_report(run: RunDirectory) -> str:
    """Write `report.html` into the run directory; returns its URL.

    Raises:
        RunError: If there is no such run.
    """
    url = run.path(REPORT_NAME)
    run.storage.write(url, report_html(RunRecord.read(run)).encode())
    return url


def report_html(record: RunRecord) -> str:
    """The page as HTML. Whatever came from outside (names, reasons, paths) is escaped."""
    sections = [
        _section("Training", _charts(record)),
        _section("Reconstructions", _picture(record)),
        _section("Attempts", _bars(record) + _timeline(record)),
        _section("Checkpoints", _checkpoints(record)),
        _section("Data faults", _faults(record)),
        _section("Skipped images", _skipped(record)),
        _section("Recipe", _pairs(_recipe_fields(record.recipe))),
        _section("Software and data", _pairs(_origins(record))),
    ]
    total_steps = record.heartbeat.get("total_steps", 0)
    return Template(PAGE).substitute(
        name=escape(record.name),
        recipe=escape(record.recipe.name),
        state=escape(record.state),
        heard=f"last heard of {_time_text(record.heard_at)} UTC" if record.heard_at else "",
        reason=_paragraph(record.ending) if record.ending else "",
        done_percent=f"{100 * record.step / total_steps:.1f}" if total_steps else "0",
        facts="".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(record)),
        sections="".join(sections),
    )


def _facts(record: RunRecord) -> Iterable[tuple[str, str]]:
    heartbeat, attempts, batch = record.heartbeat, record.attempts, record.recipe.global_batch_size
    finished = record.state == "finished"
    yield "Step", f"{record.step:,} / {heartbeat['total_steps']:,}" if heartbeat else "0"
    if epoch_steps := heartbeat.get("steps_per_epoch"):
        yield "Epoch", f"{record.step / epoch_steps:.4g} / {record.recipe.epochs:,}"
    if len(record.history):
        yield "Final loss" if finished else "Latest loss", f"{record.history.losses[-1]:.4f}"
    yield "Images trained", f"{record.step * batch:,}"
    yield "Attempts", f"{len(attempts):,}"
    if attempts:
        kinds = [event["kind"] for event in attempts]
        redone = sum(event["steps_redone"] for event in attempts)
        yield "Restarts", f"{kinds.count('restart'):,}"
        yield "Resizes", f"{kinds.count('resize'):,}"
        yield "Steps done again", f"{redone:,}"
        yield "Workers", _world_sizes([event["world_size"] for event in attempts])
        if goodput := measured_goodput(record.events):
            yield "Goodput", f"{goodput.ratio:.1%}"
        yield "Wall time", duration_text(record.heard_at - attempts[0]["at_seconds"])


def _world_sizes(sizes: Iterable[int]) -> str:
    """The sizes in turn; only their range where there were many."""
    turns = [size for size, _ in itertools.groupby(sizes)]
    return " → ".join(map(str, turns)) if len(turns) <= 6 else f"{min(turns)} to {max(turns)}"


def _charts(record: RunRecord) -> str:
    if not len(record.history):
        return _paragraph("No step was recorded yet.")
    restarts = [event["step"] for event in record.attempts if event["kind"] != "start"]
    epoch_steps = record.heartbeat.get("steps_per_epoch")
    charts = "".join(
        training_chart(
            record.history,
            global_batch_size=record.recipe.global_batch_size,
            restarts=restarts,
            epoch_steps=epoch_steps,
            canvas=canvas,
        )
        for canvas in CANVASES
    )
    return charts + (_paragraph("Dashed lines: the step from which a later attempt went on.") if restarts else "")


def _picture(record: RunRecord) -> str:
    if record.picture is None:
        return ""
    source = f"data:image/png;base64,{base64.b64encode(record.picture).decode()}"
    note = "Patches that the model saw are left as they are. "
    note += "The last row is of the newest weights, those above it of some that were written before, as of milestones."
    if record.recipe.model.norm_pix:
        note += " The model predicts normalised patches: each is shown with mean and variance of the original patch."
    image = f'<img src="{source}" alt="Originals, masked images and reconstructions">'
    return f'<div class="picture">{image}</div>{_paragraph(note)}'


def _bars(record: RunRecord) -> str:
    """The attempts over wall time: as wide as they lasted, with their workers, a mark where a failure ended one."""
    attempts = record.attempts
    if not attempts:
        return ""
    ends = [event["at_seconds"] for event in attempts[1:]] + [record.heard_at]
    bars = []
    for event, end in list(zip(attempts, ends, strict=True))[-MOST_BARS:]:
        lasted = max(1.0, end - event["at_seconds"])
        about = (
            f"attempt {event['attempt']}: {event['world_size']} workers for {duration_text(lasted)}, {event['kind']}"
        )
        bars.append(
            f'<div class="{escape(event["kind"])}" style="flex-grow: {lasted:.0f}" title="{escape(about)}">'
            f"{escape(str(event['world_size']))}</div>"
        )
    note = "Workers of each attempt over time; a mark on the left of one says that a failure came before it."
    return f'<div class="bars" role="img" aria-label="{escape(note)}">{"".join(bars)}</div>{_paragraph(note)}'


def _timeline(record: RunRecord) -> str:
    turns = [event for event in record.events if "steps_redone" in event or event["kind"] in _ENDINGS]
    if not turns:
        return _paragraph("The run has not started yet.")
    rows = [
        (
            event["attempt"],
            _time_text(event["at_seconds"]),
            event["kind"],
            event.get("world_size", ""),
            f"{event['step']:,}",
            f"{event['steps_redone']:,}" if "steps_redone" in event else "",
            event.get("reason", ""),
        )
        for event in turns[-MOST_ATTEMPTS:]
    ]
    head = ("attempt", "time (UTC)", "what", "workers", "at step", "steps redone", "reason")
    return _left_out(len(turns) - len(rows)) + _table(head, rows)


def _checkpoints(record: RunRecord) -> str:
    saved = [event for event in record.events if event["kind"] == "checkpoint"]
    if not saved:
        return _paragraph("No checkpoint was committed yet.")
    stalls = [event["stall_seconds"] for event in saved]
    written_bytes = _bytes_text(sum(event["bytes"] for event in saved))
    stall = f"in {sum(stalls):,.1f} s that training stood still for them, {max(stalls):.2f} s the longest"
    rows = [
        (
            f"{event['step']:,}",
            _time_text(event["at_seconds"]),
            _bytes_text(event["bytes"]),
            f"{event['stall_seconds']:.2f}",
            "yes" if event["step"] in record.kept_steps else "",
            "yes" if event.get("milestone") else "",
        )
        for number, event in enumerate(reversed(saved))
        if number < MOST_CHECKPOINTS or event["step"] in record.kept_steps
    ]
    head = ("step", "time (UTC)", "size", "stall (s)", "still there", "milestone")
    total = _paragraph(f"{len(saved):,} written, {written_bytes}, {stall}.")
    return total + _left_out(len(saved) - len(rows)) + _table(head, rows)


def _faults(record: RunRecord) -> str:
    if not record.faults:
        return _paragraph("None: every sample that was read is as it was ingested.")
    kinds = Counter(str(row["fault"]) for row in record.faults)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    rows = [
        (f"{row['step']:,}", row["fault"], f"{row['id']:,}", row["url"], row["reason"])
        for row in record.faults[:MOST_FAULTS]
    ]
    total = f"{len(record.faults):,} samples were found unusable and replaced: {counts}."
    total += f" The first {MOST_FAULTS} of them:" if len(rows) < len(record.faults) else ""
    return _paragraph(total) + _table(("step", "fault", "sample", "where", "reason"), rows)


def _skipped(record: RunRecord) -> str:
    if record.skipped is None:
        return _paragraph("The data set's list of skipped images is not there.")
    if not record.skipped:
        return _paragraph("None: every image of the source is in the data set.")
    shown = record.skipped[:MOST_SKIPPED]
    count = f"Images of the source that are not in the data set: {len(record.skipped):,}."
    count += f" The first {MOST_SKIPPED} of them:" if len(shown) < len(record.skipped) else ""
    return _paragraph(count) + _table(("image", "reason"), [(item["path"], item["reason"]) for item in shown])


def _recipe_fields(recipe: Recipe) -> Iterable[tuple[str, object]]:
    for name, value in recipe.to_json().items():
        if name == "model":
            yield from ((f"model.{key}", item) for key, item in value.items())
        else:
            yield name, value


def _origins(record: RunRecord) -> Iterable[tuple[str, object]]:
    yield "run directory", record.url
    yield "recipe digest", record.recipe.digest()
    if record.commit:
        yield "data set digest", record.commit.dataset_digest
        yield from record.commit.versions.items()


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def _paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    rows = (f"<div><dt>{escape(name)}</dt><dd>{escape(_value_text(value))}</dd></div>" for name, value in pairs)
    return f'<dl class="pairs">{"".join(rows)}</dl>'


def _left_out(count: int) -> str:
    return _paragraph(f"{count:,} older ones are not listed.") if count else ""


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    return f"<td>{escape(str(value))}</td>"


def _value_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _time_text(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _bytes_text(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size_bytes < 1000 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.3g} {unit}"


def _skipped_rows(data: bytes) -> Iterator[Mapping[str, str]]:
    """Rows of a data set's list of skipped images; what is none is passed over: the report is the run's."""
    for line in data.splitlines():
        with contextlib.suppress(ValueError):
            row = parsed_object(line)
            if isinstance(row.get("path"), str) and isinstance(row.get("reason"), str):
                yield row


def _read_or_none(run: RunDirectory, url: str) -> bytes | None:
    try:
        return run.storage.read(url)
    except FileNotFoundError:
        return None
