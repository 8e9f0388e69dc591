from __future__ import annotations

import pytest

from jobs.cluster.interfaces import UNREACHED_REMEDY
from jobs.errors import CheckpointError, NotCommittedError, RecipeError
from jobs.monitor.failure_cause import describe_failure, describe_start_failure, failure_cause
from pipeline.errors import CredentialsError, DatasetError, ReplacedError, StorageError, UnreachableError

COLLATERAL = RuntimeError("[../gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]:4242")


class WrappedError(Exception):
    """As Ray wraps what a task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long traceback\nof another process")
        self.cause = cause


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_rank_that_died_first_is_named_not_its_peers(order: tuple[int, int]) -> None:
    errors: list[Exception] = [COLLATERAL, ValueError("boom\nmore")]

    text, remedy = describe_failure({rank: errors[order[rank]] for rank in (0, 1)})

    assert text == f"rank {order.index(1)}: ValueError: boom"
    assert remedy == "restart"


def test_peers_are_named_where_there_is_nothing_else() -> None:
    text, remedy = describe_failure({3: COLLATERAL})

    assert text.startswith("rank 3: RuntimeError: ")
    assert "Connection closed by peer" in text
    assert remedy == "restart"


def test_a_users_error_is_the_cause_and_fatal_however_deep_it_is_wrapped() -> None:
    error = DatasetError("data set", "must be whole", "shard-000001.tar", "copy it again")
    from_error = RuntimeError("outer")
    from_error.__cause__ = WrappedError(error)

    text, remedy = describe_failure({0: ValueError("boom"), 1: COLLATERAL, 2: from_error})

    assert text == f"rank 2: DatasetError: {error}"
    assert remedy == "none"


def test_a_failure_without_words_is_still_one_line() -> None:
    assert describe_failure({0: ValueError()}) == ("rank 0: ValueError: ", "restart")


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ([UnreachableError("storage", "must be reachable", "s3://b/k", "wait")], "restart"),
        ([NotCommittedError("checkpoint", "must be committed", "step 8: refused", "resume")], "restart"),
        ([CredentialsError("credentials", "must be accepted", "s3://b/k", "renew")], "restart after progress"),
        ([StorageError("disk", "must have space left", "/x", "free some")], "restart after progress"),
        ([ReplacedError("object", "must be the one that was meant", "s3://b/k", "restore it")], "none"),
        ([RecipeError("epochs", "must be positive", 0, "correct it")], "none"),
        ([CheckpointError("data", "must be the one of the run", "x", "restore it")], "none"),
        (
            [CredentialsError("credentials", "must be accepted", "s3://b/k", "renew"), COLLATERAL],
            "restart after progress",
        ),
        ([COLLATERAL, CredentialsError("c", "r", "v", "m"), DatasetError("d", "r", "v", "m")], "none"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_store_that_took_us_once_may_do_so_again_and_bad_input_stays_bad(
    errors: list[Exception], expected: str
) -> None:
    assert describe_failure(dict(enumerate(errors))).remedy == expected


UNREACHED = (
    "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection"
    " refused, remote=[127.0.1.1]:26515$2",
    "NCCL error in: ProcessGroupNCCL.cpp:3, unhandled system error, NCCL version 2.27.3\nncclSystemError: System call"
    " (e.g. socket, malloc) or external library call failed or device error.",
    "The client socket has timed out after 600000ms while trying to connect to (10.0.0.4, 41233).",
)


@pytest.mark.parametrize("text", UNREACHED)
def test_ranks_that_do_not_reach_each_other_are_told_what_to_do(text: str) -> None:
    started = WrappedError(RuntimeError(text))

    line, remedy = describe_start_failure(started)

    assert line == f"start of the ranks: RuntimeError: {text.splitlines()[0]}; {UNREACHED_REMEDY}"
    assert remedy == "restart"
    assert failure_cause(line) == "RuntimeError"
    assert describe_failure({0: started})[0] == f"rank 0: RuntimeError: {text.splitlines()[0]}; {UNREACHED_REMEDY}"


def test_what_has_nothing_to_do_with_the_network_has_no_such_remedy() -> None:
    assert UNREACHED_REMEDY not in describe_failure({0: ValueError("boom"), 1: COLLATERAL})[0]
    assert UNREACHED_REMEDY not in describe_failure({1: COLLATERAL})[0], "a rank that died is another matter"
    store = UnreachableError("s3://bucket", "must answer (Connection refused)", None, "is it up?")
    assert UNREACHED_REMEDY not in describe_failure({0: store})[0]
