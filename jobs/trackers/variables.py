"""The variables by which trackers know their servers, and texts without what is secret in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import unquote

_SECRET_NAME = re.compile(r"KEY|TOKEN|PASSWORD|SECRET|CREDENTIAL|HEADERS")
_CREDENTIALS = re.compile(r"(?<=://)[^/\s@]+@")
"""`user:password@` of an address."""
HIDDEN = "(not shown)"


def without_secrets(text: str, environ: Mapping[str, str]) -> str:
    """A text in which no value of a secret variable stands, and no address with a password."""
    for name, value in environ.items():
        if _SECRET_NAME.search(name) and value:
            text = text.replace(value, HIDDEN).replace(unquote(value), HIDDEN)
    return _CREDENTIALS.sub(f"{HIDDEN}@", text)
