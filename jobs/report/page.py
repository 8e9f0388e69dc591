"""A page of ours, whatever it reports: one self-contained HTML file, for screens, phones, print and dark mode."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from string import Template

ALONE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content-Security-Policy of a page that holds all that it shows."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="$policy">
<title>$title</title>
<style>
:root { --page: #fff; --card: #f5f6f8; --ink: #1b1f24; --faint: #616a75; --rule: #dfe3e8; --accent: #2563a8;
  --mark: #c2571a; --good: #1d7a46; --bad: #b3261e }
@media screen and (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1e2226; --ink: #e8eaed;
  --faint: #9aa4af; --rule: #343a41; --accent: #74b0f4; --mark: #f0975a; --good: #63c48d; --bad: #f28b82 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--rule); font-size: 1.15rem }
p { margin: .5rem 0; color: var(--faint); overflow-wrap: anywhere }
header p { margin: 0 0 .25rem }
.state { margin-left: .4rem; padding: .1rem .6rem; border: 1px solid; border-radius: 1rem; font-size: .85rem;
  color: var(--accent); white-space: nowrap }
.state[data-state=finished] { color: var(--good) }
.state[data-state=failed] { color: var(--bad) }
.bar { height: .4rem; margin: 1rem 0; border-radius: .2rem; background: var(--rule); overflow: hidden }
.bar div { height: 100%; background: var(--accent); print-color-adjust: exact; -webkit-print-color-adjust: exact }
dl { margin: 0 }
dt { color: var(--faint); font-size: .85rem }
dd { margin: 0; font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .75rem }
.facts div { padding: .6rem .8rem; border-radius: .5rem; background: var(--card) }
.facts dd { font-size: 1.15rem; font-weight: 600 }
.pairs { columns: 2 22rem; column-gap: 2.5rem }
.pairs div { display: flex; justify-content: space-between; gap: 1rem; padding: .2rem 0; break-inside: avoid;
  border-bottom: 1px solid var(--rule) }
.pairs dt { flex-shrink: 0 }
.pairs dd { text-align: right; font-size: .85rem }
.table { overflow: auto; max-height: 32rem }
.table + .table, h1 + .facts { margin-top: 1rem }
.picture { overflow-x: auto }
.bars { display: flex; gap: 1px; height: 2.2rem; border-radius: .3rem; overflow: hidden }
.bars div { flex-basis: 0; min-width: 2px; overflow: hidden; background: var(--card); color: var(--ink);
  border-left: 3px solid var(--accent); font-size: .8rem; line-height: 2.2rem; text-align: center;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
.bars .restart { border-left-color: var(--mark) }
a { color: var(--accent) }
.notice { padding: .6rem .8rem; border-left: 3px solid var(--mark); border-radius: .3rem; background: var(--card);
  color: var(--ink) }
table { width: 100%; border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1rem .35rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top }
th { position: sticky; top: 0; background: var(--page); color: var(--faint); font-weight: 400 }
th, td:not(:last-child) { white-space: nowrap }
td:last-child { min-width: 12rem; overflow-wrap: anywhere }
img, svg { display: block; width: 100%; height: auto }
.matrix { width: auto }
.matrix td, .matrix th { padding: .2rem .45rem; border: 0; text-align: right; white-space: nowrap; min-width: 0 }
.matrix td { background: color-mix(in srgb, var(--accent) calc(var(--share) * 80%), var(--card));
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
.matrix td.hit { font-weight: 600 }
img { border: 1px solid var(--rule); border-radius: .5rem }
svg text { font-family: inherit !important }
svg.narrow { display: none }
@media (max-width: 40rem) { svg.wide { display: none } svg.narrow { display: block }
  body { padding: 1.25rem 1rem 3rem } .facts { grid-template-columns: 1fr 1fr; gap: .5rem }
  .picture img { width: 48rem } th, td { padding-right: .7rem } td { white-space: normal !important } }
@media print { body { max-width: none; padding: 0; font-size: 11px } .table { max-height: none }
  section, tr { break-inside: avoid } svg.wide { display: block } svg.narrow { display: none } }
</style>
</head>
<body>
<header>
$header
$facts
</header>
<main>
$sections</main>
$script</body>
</html>
"""


@dataclass(frozen=True)
class Link:
    """A cell that leads to another page of the same server."""

    text: str
    target: str
    """A relative URL, as it stands in an address."""


def page(
    *,
    title: str,
    header: str,
    facts: Iterable[tuple[str, str]],
    sections: Iterable[str],
    policy: str = ALONE,
    script: str = "",
) -> str:
    """A whole page; what UTF-8 has no bytes for, as in names of files in other encodings, is in it as escapes.

    Args:
        title: Of the window; text.
        header: HTML that stands above the facts.
        facts: Name and value of each figure at the top; text.
        sections: HTML, as `section` makes it.
        policy: What the page may load and run.
        script: The `<script>` element of a page that has one.
    """
    text = Template(_PAGE).substitute(
        title=escape(title),
        header=header,
        facts=facts_html(facts),
        sections="".join(sections),
        policy=escape(policy, quote=True),
        script=script,
    )
    return text.encode("utf-8", "backslashreplace").decode()


def facts_html(facts: Iterable[tuple[str, str]]) -> str:
    """Figures as they stand at the top of a page."""
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def section(title: str, body: str) -> str:
    """A titled part; nothing where the body is empty."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>\n" if body else ""


def paragraph(text: str) -> str:
    """Text in a paragraph."""
    return f"<p>{escape(text)}</p>"


def pairs(rows: Iterable[tuple[str, object]]) -> str:
    """Names and values in two columns; what is no text is shown as JSON."""
    shown = (f"<div><dt>{escape(name)}</dt><dd>{escape(_value_text(value))}</dd></div>" for name, value in rows)
    return f'<dl class="pairs">{"".join(shown)}</dl>'


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows of text below the names of their columns."""
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(value: object) -> str:
    if isinstance(value, Link):
        return f'<td><a href="{escape(value.target)}">{escape(value.text)}</a></td>'
    return f"<td>{escape(str(value))}</td>"


def _value_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
