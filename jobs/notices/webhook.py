"""One POST to a webhook. Its URL is a secret: no error, log line or repr has more of it than the host."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from jobs.errors import RecipeError
from jobs.notices.notice_rules import Notice
from jobs.recipe.carried import carried_variables
from jobs.recipe.recipe import NotifyFormat
from jobs.run.directory import RunDirectory
from pipeline.errors import UserError, clipped

ANSWER_SECONDS = 10.0
_SLACK_HOST = "hooks.slack.com"
_PASSING = frozenset({408, 425, 429})
"""Refusals after which another try may succeed, as after any status of 500 and more."""
_TITLES = {
    "failed": "has failed",
    "finished": "is finished",
    "waiting": "waits for nodes",
    "restart-loop": "is restarted too often",
    "not-finite": "had a loss or gradient that is not finite",
    "slow": "has become slow",
}


class UndeliveredError(Exception):
    """A notice that did not arrive; the message names the host alone."""

    def __init__(self, why: str, *, is_final: bool) -> None:
        super().__init__(why)
        self.is_final = is_final
        """Whether another try is pointless."""


@dataclass(frozen=True)
class Webhook:
    """Where notices of a run go."""

    url: str = field(repr=False)
    format: NotifyFormat
    run: RunDirectory

    @classmethod
    def of(cls, fields: Mapping[str, Any], environ: Mapping[str, str], run: RunDirectory) -> Webhook | None:
        """The webhook of a recipe; None if it has none.

        Args:
            fields: Of the recipe; one of an earlier release may lack those of notices.
            environ: Of the shell that began the run, as a job's own processes have it.
            run: The run; its store knows the proxies.

        Raises:
            RecipeError: The variable is not set, or holds no address. The message does not show what it holds.
        """
        named = str(fields.get("notify_url") or "")
        if not named:
            return None
        name = named.removeprefix("env:")
        url = carried_variables(environ).get(name, "").strip()
        if not url:
            raise RecipeError("notify_url", "must name a variable that is set", named, f"export {name}=https://...")
        if not _is_address(url):
            rule = f"must name a variable with the address of a webhook, without user and password; {name} holds none"
            raise RecipeError("notify_url", rule, named, "write https://HOST/PATH into it")
        return cls(url, fields.get("notify_format", "auto"), run)

    @property
    def host(self) -> str:
        """Its host, which is all that may be shown."""
        return clipped(urlsplit(self.url).hostname or "")

    def post(self, notice: Notice, seconds: float = ANSWER_SECONDS) -> None:
        """Send a notice, by the user's proxies.

        Args:
            notice: What about.
            seconds: For which a silent server is waited for.

        Raises:
            UndeliveredError: It was not accepted.
        """
        body = json.dumps(self._slack(notice) if self._is_slack else self._json(notice)).encode()
        request = Request(self.url, body, {"Content-Type": "application/json", "User-Agent": "convmae"}, method="POST")
        try:
            proxy = self.run.storage.proxies_here.for_url(self.url)
        except UserError as error:  # it is no address of a proxy
            raise UndeliveredError(f"{error.field} {error.rule}", is_final=True) from None
        handler = ProxyHandler({urlsplit(self.url).scheme: proxy} if proxy else {})
        try:
            with build_opener(handler, _NoRedirect).open(request, timeout=seconds):
                return
        except HTTPError as error:
            error.close()
            is_final = error.code < 500 and error.code not in _PASSING
            raise UndeliveredError(f"{self.host} answered {error.code}", is_final=is_final) from None
        except TimeoutError:
            raise UndeliveredError(f"{self.host} did not answer within {seconds:g} s", is_final=False) from None
        except URLError as error:
            why = error.reason if isinstance(error.reason, OSError) else error
            raise UndeliveredError(f"{self.host} is unreachable ({type(why).__name__})", is_final=False) from None
        except (OSError, HTTPException, ValueError) as error:
            raise UndeliveredError(f"{self.host} broke off ({type(error).__name__})", is_final=False) from None

    @property
    def _is_slack(self) -> bool:
        return self.format == "slack" or (self.format == "auto" and self.host == _SLACK_HOST)

    def _slack(self, notice: Notice) -> dict[str, str]:
        where = f"step {notice.step:,}, attempt {notice.attempt}"
        text = f"*{self.run.name}* {_TITLES[notice.kind]} ({where})"
        return {"text": _escaped(f"{text}: {notice.reason}" if notice.reason else text)}

    def _json(self, notice: Notice) -> dict[str, Any]:
        return {
            "run": self.run.name,
            "directory": self.run.url,
            "kind": notice.kind,
            "title": f"{self.run.name} {_TITLES[notice.kind]}",
            "reason": notice.reason,
            "step": notice.step,
            "attempt": notice.attempt,
            "at": datetime.fromtimestamp(notice.at_seconds, UTC).isoformat(timespec="seconds"),
        }


class _NoRedirect(HTTPRedirectHandler):
    """A redirected POST becomes a GET, which is answered by a page, and notifies nobody."""

    def redirect_request(self, *arguments: Any) -> None:  # noqa: ARG002
        return None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and "@" not in parts.netloc
            and url.isprintable()
        )
    except ValueError:
        return False


def _escaped(text: str) -> str:
    """As Slack wants it, so that a reason neither links nor mentions anybody."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
