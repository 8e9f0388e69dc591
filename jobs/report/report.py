"""The report of a run: one self-contained HTML file, for screens, phones, print and dark mode.

It is written from the run directory alone, at any time: a run that is still training, was cut off or never made a step
is reported as far as it came. The same directory gives the same bytes.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from html import escape

from jobs.metrics.goodput import measured_goodput
from jobs.recipe.differences import recipe_fields
from jobs.recipe.resolution import resolutions_text
from jobs.report.page import page, pairs, paragraph, section, table
from jobs.report.reported_run import ReportedRun
from jobs.report.status import world_sizes_text
from jobs.run.directory import REPORT_NAME, RunDirectory
from jobs.terminal import duration_text

MOST_ATTEMPTS = 400
"""Newest events of attempts that are listed."""
MOST_CHECKPOINTS = 40
"""Newest checkpoints that are listed, in addition to those that still exist."""
MOST_FAULTS = 50
"""Samples found unusable that are named."""
MOST_BARS = 60
"""Newest attempts that the timeline shows; narrower bars could not be distinguished on a phone."""
MOST_SKIPPED = 20
"""Skipped images that are named."""
_ENDINGS = frozenset({"finished", "stopped", "failed"})


def write_report(run: RunDirectory) -> str:
    """Write `report.html` into the run directory; returns its URL.

    Raises:
        RunError: If there is no such run.
    """
    url = run.path(REPORT_NAME)
    run.storage.write(url, report_html(ReportedRun.read(run)).encode())
    return url


def report_html(run: ReportedRun) -> str:
    """The page as HTML. All outside text (names, reasons, paths) is escaped."""
    sections = [
        section("Training", training(run)),
        section("Accuracy", accuracy(run)),
        section("Reconstructions", reconstructions(run)),
        section("Attempts", attempt_bars(run) + attempt_rows(run)),
        section("Checkpoints", checkpoints(run)),
        section("Data faults", data_faults(run)),
        section("Skipped images", _skipped(run)),
        section("Recipe", pairs(recipe_fields(run.recipe))),
        section("Software and data", pairs(_origins(run))),
    ]
    return page(title=f"{run.name} · ConvMAE run", header=header(run), facts=facts(run), sections=sections)


def header(run: ReportedRun) -> str:
    """What stands above all: name, state, how far it is."""
    heard = f"last heard of {time_text(run.heard_at)} UTC" if run.heard_at else ""
    name, recipe, state = (escape(text) for text in (run.name, run.recipe.name, run.state))
    total_steps = run.heartbeat.get("total_steps", 0)
    done_percent = f"{100 * run.step / total_steps:.1f}" if total_steps else "0"
    lines = [
        f"<p>ConvMAE {'fine-tuning' if run.recipe.finetune else 'pretraining'} · recipe {recipe} · {heard}</p>",
        f'<h1>{name} <span class="state" data-state="{state}">{state}</span></h1>',
        paragraph(run.ending) if run.ending else "",
        f'<div class="bar"><div style="width: {done_percent}%"></div></div>',
    ]
    return "\n".join(lines)


def facts(run: ReportedRun) -> Iterable[tuple[str, str]]:
    """The figures at the top, by name; text."""
    heartbeat, attempts, batch = run.heartbeat, run.attempts, run.recipe.global_batch_size
    finished = run.state == "finished"
    yield "Step", f"{run.step:,} / {heartbeat['total_steps']:,}" if heartbeat else "0"
    if epoch_steps := heartbeat.get("steps_per_epoch"):
        yield "Epoch", f"{run.step / epoch_steps:.4g} / {run.recipe.epochs:,}"
    if len(run.history):
        yield "Final loss" if finished else "Latest loss", f"{run.history.last_loss:.4f}"
    if newest := run.accuracies.newest:
        what = "Validation top-1" if run.recipe.finetune else "kNN accuracy"
        yield what, f"{newest.accuracies[run.accuracies.main]:.1%}"
    if run.mfu_ratio is not None:
        yield "MFU", f"{run.mfu_ratio:.1%}"
    yield "Images trained", f"{run.step * batch:,}"
    if (views := run.recipe.model.views) > 1 and not run.recipe.finetune:
        yield "Masks of each", f"{views}"
    if run.recipe.resolution_schedule:
        yield "Image size", resolutions_text(run.recipe.resolutions)
    yield "Attempts", f"{len(attempts):,}"
    if attempts:
        kinds = [event["kind"] for event in attempts]
        redone = sum(event["steps_redone"] for event in attempts)
        yield "Restarts", f"{kinds.count('restart'):,}"
        yield "Resizes", f"{kinds.count('resize'):,}"
        yield "Steps redone", f"{redone:,}"
        yield "Workers", world_sizes_text([event["world_size"] for event in attempts])
        if goodput := measured_goodput(run.events):
            yield "Goodput", f"{goodput.ratio:.1%}"
        yield "Wall time", duration_text(run.heard_at - attempts[0]["at_seconds"])


def training(run: ReportedRun) -> str:
    """Loss, learning rate, speed, MFU and workers over the steps."""
    if not len(run.history):
        return paragraph("No step was recorded yet.")
    from jobs.report.charts import CANVASES, training_chart  # matplotlib, when what was read is reduced already

    restarts = [event["step"] for event in run.attempts if event["kind"] != "start"]
    epoch_steps = run.heartbeat.get("steps_per_epoch")
    charts = "".join(
        training_chart(
            run.history,
            global_batch_size=run.recipe.global_batch_size,
            restarts=restarts,
            epoch_steps=epoch_steps,
            canvas=canvas,
        )
        for canvas in CANVASES
    )
    return charts + (paragraph("Dashed lines: the step from which a later attempt resumed.") if restarts else "")


def accuracy(run: ReportedRun) -> str:
    """Of a pretraining by its probes; of a fine-tuning as it was measured while it trained."""
    curve, failed = run.accuracies, sum(event["kind"] == "probe-failed" for event in run.events)
    faults = paragraph(f"{failed:,} probes failed: see the events `probe-failed`.") if failed else ""
    if not curve.rows:
        return faults or paragraph("Not measured.")
    from jobs.report.accuracy import accuracy_chart, accuracy_head, accuracy_rows
    from jobs.report.charts import CANVASES

    control = "weights of init_from" if run.recipe.init_from else "random weights"
    epoch_steps = run.heartbeat.get("steps_per_epoch")
    charts = "".join(
        accuracy_chart(curve, epoch_steps=epoch_steps, control=control, canvas=canvas) for canvas in CANVASES
    )
    what = "Measured" if run.recipe.finetune else "Top-1"
    note = f"{what} on {curve.rows[-1].tested:,} labelled samples that were not learned from; intervals are of these "
    note += f"samples alone, at 95 %.{f' Step 0 is before training: {control}.' if curve.control else ''}"
    return charts + paragraph(note) + table(accuracy_head(curve), list(accuracy_rows(curve))) + faults


def reconstructions(run: ReportedRun) -> str:
    """The picture of them, if the run has one."""
    if run.picture is None:
        return ""
    source = f"data:image/png;base64,{base64.b64encode(run.picture).decode()}"
    note = "Patches that the model saw are left as they are. "
    note += "The last row is of the newest weights, those above it of some that were written before, as of milestones."
    if run.recipe.model.norm_pix:
        note += " The model predicts normalised patches: each is shown with mean and variance of the original patch."
    if (views := run.recipe.model.views) > 1:
        note += f" In training an image is masked {views} times, each patch visible once: this is the first mask."
    if run.recipe.resolution_schedule:
        note += " Pictures have the last of the run's image sizes."
    image = f'<img src="{source}" alt="Originals, masked images and reconstructions">'
    return f'<div class="picture">{image}</div>{paragraph(note)}'


def attempt_bars(run: ReportedRun) -> str:
    """The attempts over wall time: as wide as they lasted, with their workers, and a mark after a failure."""
    attempts = run.attempts
    if not attempts:
        return ""
    ends = [event["at_seconds"] for event in attempts[1:]] + [run.heard_at]
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
    return f'<div class="bars" role="img" aria-label="{escape(note)}">{"".join(bars)}</div>{paragraph(note)}'


def attempt_rows(run: ReportedRun) -> str:
    """What began and ended attempts, and why."""
    turns = [event for event in run.events if "steps_redone" in event or event["kind"] in _ENDINGS]
    if not turns:
        return paragraph("The run has not started yet.")
    rows = [
        (
            event["attempt"],
            time_text(event["at_seconds"]),
            event["kind"],
            event.get("world_size", ""),
            f"{event['step']:,}",
            event.get("restored_from", ""),
            f"{event['steps_redone']:,}" if "steps_redone" in event else "",
            event.get("reason", ""),
        )
        for event in turns[-MOST_ATTEMPTS:]
    ]
    head = ("attempt", "time (UTC)", "what", "workers", "at step", "from", "steps redone", "reason")
    return _unlisted(len(turns) - len(rows)) + table(head, rows)


def checkpoints(run: ReportedRun) -> str:
    """Those in the store, and what they cost."""
    saved = [event for event in run.events if event["kind"] == "checkpoint"]
    if not saved:
        return paragraph("No checkpoint was committed yet.")
    stalls = [event["stall_seconds"] for event in saved]
    written_bytes = _bytes_text(sum(event["bytes"] for event in saved))
    stall = f"in {sum(stalls):,.1f} s of paused training, {max(stalls):.2f} s the longest"
    rows = [
        (
            f"{event['step']:,}",
            time_text(event["at_seconds"]),
            _bytes_text(event["bytes"]),
            f"{event['stall_seconds']:.2f}",
            "yes" if event["step"] in run.kept_steps else "",
            "yes" if event.get("milestone") else "",
        )
        for number, event in enumerate(reversed(saved))
        if number < MOST_CHECKPOINTS or event["step"] in run.kept_steps
    ]
    head = ("step", "time (UTC)", "size", "stall (s)", "still exists", "milestone")
    total = paragraph(f"{len(saved):,} written, {written_bytes}, {stall}.")
    return total + _unlisted(len(saved) - len(rows)) + table(head, rows)


def data_faults(run: ReportedRun) -> str:
    """Samples that were found unusable."""
    if not run.faults:
        return paragraph("None: every sample that was read is as it was ingested.")
    kinds = Counter(str(row["fault"]) for row in run.faults)
    counts = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common())
    rows = [
        (f"{row['step']:,}", row["fault"], f"{row['id']:,}", row["url"], row["reason"])
        for row in run.faults[:MOST_FAULTS]
    ]
    total = f"{len(run.faults):,} samples were found unusable and replaced: {counts}."
    total += f" The first {MOST_FAULTS} of them:" if len(rows) < len(run.faults) else ""
    return paragraph(total) + table(("step", "fault", "sample", "where", "reason"), rows)


def _skipped(run: ReportedRun) -> str:
    if run.skipped is None:
        return paragraph("The data set's list of skipped images is not there.")
    if not run.skipped:
        return paragraph("None: every image of the source is in the data set.")
    shown = run.skipped[:MOST_SKIPPED]
    count = f"Images of the source that are not in the data set: {len(run.skipped):,}."
    count += f" The first {MOST_SKIPPED} of them:" if len(shown) < len(run.skipped) else ""
    return paragraph(count) + table(("image", "reason"), [(item["path"], item["reason"]) for item in shown])


def _origins(run: ReportedRun) -> Iterable[tuple[str, object]]:
    yield "run directory", run.url
    yield "recipe digest", run.recipe.digest()
    if run.devices:
        yield "devices", " → ".join(run.devices)
    if run.commit:
        yield "data set digest", run.commit.dataset_digest
        yield from run.commit.versions.items()


def _unlisted(count: int) -> str:
    return paragraph(f"{count:,} older ones are not listed.") if count else ""


def time_text(seconds: float) -> str:
    """A Unix time in UTC."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


def _bytes_text(size_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if size_bytes < 1000 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.3g} {unit}"
