"""A Ray cluster of this process alone, for the tests of what runs on one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

STARTS = 3
"""Ray gives a node that starts 30 seconds, in its code; on cores that other tests use that was too little once."""


@contextmanager
def ray_here(token: str, **options: Any) -> Iterator[None]:
    """Start it, and stop it with the context.

    Args:
        token: Of `token_of_this_process`.
        options: More for `ray.init`.
    """
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("RAY_AUTH_MODE", raising=False)  # Ray sets it and would leave it to the tests after us
        environment.setenv("RAY_AUTH_TOKEN", token)  # else Ray makes one in the home folder
        for start in range(STARTS):
            try:
                ray.init(include_dashboard=False, log_to_driver=False, **options)
                break
            except Exception as error:  # of no narrower type
                ray.shutdown()
                if start + 1 == STARTS or "timed out during startup" not in str(error):
                    raise
        yield
        ray.shutdown()
