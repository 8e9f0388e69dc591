"""A filter of a job's log: lines of this project, without those of Ray, torch and gRPC."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

_ORIGIN = re.compile(r"^(?:\x1b\[\d+m)?\([^()]*\b(?:pid|ip)=[^()]*\)(?:\x1b\[0m)? ")
"""The prefix that Ray gives to a worker's line: `(RayTrainWorker pid=17, ip=10.0.0.2) `."""
_REPEATED = re.compile(r" ?(?:\x1b\[\d+m)?\[repeated \d+x across cluster\].*$")
_FOREIGN = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\t[A-Z]+ \S+:\d+ -- "  # Ray in Python
    r"|\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [CEWID] \d+ \d+\] "  # Ray in C++
    r"|(?:\[rank\d+\]:)?\[[WIEF]\d{3,4} \d\d:\d\d:\d\d.*?\] "  # torch in C++: c10d, gloo
    r"|\[Gloo\] "
    r"|(?:WARNING: All log messages before absl|[IWEF]\d{4} (?:00:00:\d+|\d\d:\d\d:\d\d)\.\d+ +\d+ \S+:\d+\] )"  # gRPC
)


def own_lines(lines: Iterable[str]) -> Iterator[str]:
    """The lines of this project, without what Ray adds to them when many workers print the same.

    Args:
        lines: Of a job's log, without their ends.
    """
    for line in lines:
        origin = _ORIGIN.match(line)
        said = line[origin.end() :] if origin else line
        if not _FOREIGN.match(said):
            yield _REPEATED.sub("", line) if origin else line
