"""The page of an evaluation: accuracies with their intervals, each class, and what was taken for what."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape

import numpy as np

from jobs.evaluate.evaluation import Evaluation
from jobs.evaluate.scores import Accuracy, Scores
from jobs.report.page import page, pairs, paragraph, section, table

MOST_MATRIX_CLASSES = 30
"""Of more classes the pairs that are confused most often are listed instead."""
MOST_PAIRS = 40


def evaluation_html(evaluation: Evaluation) -> str:
    """The page as HTML. All outside text (names of classes, URLs) is escaped."""
    name = evaluation.subject.name
    train, test = evaluation.samples.train, evaluation.samples.test
    header = f"<p>ConvMAE evaluation · {len(test):,} test samples, {len(train):,} to learn from</p>"
    sections = [
        section("Accuracy", _accuracies(evaluation.scores)),
        *(section(scores.name, _confusion(scores) + _classes(scores)) for scores in evaluation.scores),
        section("What was evaluated", pairs(_origins(evaluation))),
    ]
    return page(
        title=f"{name} · ConvMAE evaluation",
        header=f"{header}\n<h1>{escape(name)}</h1>",
        facts=((scores.name, share_text(scores.top1)) for scores in evaluation.scores),
        sections=sections,
    )


def share_text(accuracy: Accuracy | None) -> str:
    """An accuracy in percent, or `-`."""
    return "-" if accuracy is None or accuracy.ratio is None else f"{accuracy.ratio:.1%}"


def interval_text(accuracy: Accuracy | None) -> str:
    """Its 95 % confidence interval in percent, or `-`."""
    interval = None if accuracy is None else accuracy.interval
    return "-" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"


def accuracy_rows(scores: Iterable[Scores]) -> Iterator[tuple[str, ...]]:
    """Method, top-1 and top-5 with their intervals."""
    for each in scores:
        yield each.name, *(shown(part) for part in (each.top1, each.top5) for shown in (share_text, interval_text))


ACCURACY_COLUMNS = ("method", "top-1", "95 % interval", "top-5", "95 % interval")


def _accuracies(scores: tuple[Scores, ...]) -> str:
    chance = 1 / len(scores[0].classes)
    note = f"Intervals are Wilson's, of the test samples alone. Chance among {len(scores[0].classes)} equal classes is "
    note += f"{chance:.1%}."
    odd = [each.name for each in scores if not each.settings.get("has_converged", True)]
    note += f" The {odd[0]} did not reach its minimum." if odd else ""
    return table(ACCURACY_COLUMNS, list(accuracy_rows(scores))) + paragraph(note)


def _classes(scores: Scores) -> str:
    rows = [
        (name, f"{part.samples:,}", f"{part.correct:,}", share_text(part), interval_text(part))
        for name, part in zip(scores.classes, scores.per_class, strict=True)
    ]
    return table(("class", "samples", "right", "top-1", "95 % interval"), rows)


def _confusion(scores: Scores) -> str:
    if len(scores.classes) > MOST_MATRIX_CLASSES:
        return _confused_pairs(scores)
    matrix = scores.confusion
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *scores.classes))
    rows = []
    for row, name in enumerate(scores.classes):
        cells = "".join(
            f'<td style="--share: {shares[row, column]:.3f}"{" class=hit" if row == column else ""}>{count:,}</td>'
            for column, count in enumerate(matrix[row].tolist())
        )
        rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    note = paragraph("Test samples by their class, in rows, and by the class that was predicted.")
    body = "".join(rows)
    return f'{note}<div class="table"><table class="matrix"><thead><tr>{head}</tr></thead>{body}</table></div>'


def _confused_pairs(scores: Scores) -> str:
    predicted = scores.ranking[:, 0]
    wrong = predicted != scores.labels
    found, counts = np.unique(np.stack([scores.labels[wrong], predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:MOST_PAIRS]
    rows = [
        (*(scores.classes[label] for label in pair), f"{count:,}")
        for pair, count in zip(found[:, order].T.tolist(), counts[order].tolist(), strict=True)
    ]
    return paragraph("What is confused most often:") + table(("class", "taken for", "samples"), rows)


def _origins(evaluation: Evaluation) -> Iterator[tuple[str, object]]:
    report = evaluation.to_json()
    for part in ("weights", "train", "test", "choice", "features", "model"):
        yield from ((f"{part}: {name}", value) for name, value in report[part].items())
