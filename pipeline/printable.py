"""Text for a terminal or a log: names out of tars, file systems and other people's files can hold anything."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """`text` in one line without control characters, which are written as escapes: `\\x1b`, `\\n`, `\\u202e`.

    They could forge lines, move the cursor or change the direction of what follows.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_shown(char) else char.encode("unicode_escape").decode() for char in text)


def _is_shown(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # the wide space of Chinese, say
