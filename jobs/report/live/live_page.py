"""A page whose parts are replaced while it is open: a frame of empty places, and the script that fills them.

The script asks for parts whose digests the page does not have, every two seconds while the page is visible. The policy
allows this one script, by its digest, and nothing from elsewhere; HTML in parts cannot run any.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from jobs.report.page import page

RUN_PARTS = (
    "header",
    "facts",
    "training",
    "accuracy",
    "ranks",
    "attempts",
    "checkpoints",
    "events",
    "faults",
    "reconstructions",
    "recipe",
)
"""Parts of the page of a run, in its order."""

SCRIPT = """
"use strict";
const POLL_MILLISECONDS = 2000, PATIENCE_MILLISECONDS = 10000;
const digests = new Map(), notice = document.querySelector("[data-notice]");
const places = new Map([...document.querySelectorAll("[data-part]")].map(place => [place.dataset.part, place]));
let answeredAt = new Date();

function say(text) {
  if (notice.textContent !== text) notice.textContent = text;
  notice.hidden = !text;
}

function scrollers(place) {
  return [...place.querySelectorAll(".table, .picture")];
}

function isSelected(place) {
  const selection = getSelection();
  return !selection.isCollapsed && selection.rangeCount > 0 && selection.getRangeAt(0).intersectsNode(place);
}

function put(name, digest, html) {
  const place = places.get(name);
  if (!place || (digests.has(name) && isSelected(place))) return;
  const kept = scrollers(place).map(element => [element.scrollLeft, element.scrollTop]);
  place.innerHTML = html;
  scrollers(place).slice(0, kept.length).forEach((element, number) => element.scrollTo(...kept[number]));
  digests.set(name, digest);
}

async function look() {
  const about = {cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MILLISECONDS)};
  try {
    const answer = await fetch(`parts?have=${[...digests.values()].join(",")}`, about);
    if (!answer.ok) {
      say(await answer.text());
      return;
    }
    const found = await answer.json();
    for (const [name, [digest, html]] of Object.entries(found.parts)) put(name, digest, html);
    say(found.notice);
    answeredAt = new Date();
  } catch {
    const since = answeredAt.toLocaleTimeString();
    say(`No answer since ${since}: what is shown is old. A run that was restarted may have another address.`);
  }
}

async function follow() {
  if (!document.hidden) await look();
  setTimeout(follow, POLL_MILLISECONDS);
}

document.addEventListener("visibilitychange", () => document.hidden || look());
follow();
"""

_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_IN_PAGE = (
    "default-src 'none'",
    f"script-src 'sha256-{_DIGEST}'",
    "style-src 'unsafe-inline'",
    "img-src data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'none'",
)
POLICY = "; ".join((*_IN_PAGE, "frame-ancestors 'none'"))
"""Content-Security-Policy of the page, as a header."""


def frame(title: str, parts: Sequence[str], *, back: str = "") -> str:
    """The page without its parts.

    Args:
        title: Of the window; text.
        parts: Names of its parts, in their order.
        back: A relative URL of the page above; empty: there is none.
    """
    notice = '<p class="notice" data-notice role="status">Reading ...</p>'
    above = f'<p><a href="{escape(back)}">All runs</a></p>' if back else ""
    places = "".join(f'<div data-part="{escape(part)}"></div>\n' for part in parts)
    return page(
        title=title,
        header=above + notice,
        facts=(),
        sections=[places],
        policy="; ".join(_IN_PAGE),  # a page in a file cannot say who may frame it
        script=f"<script>{SCRIPT}</script>\n",
    )
