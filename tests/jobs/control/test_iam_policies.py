"""infra/iam: the whole line under its policies and no more, on a store that enforces them, with S3's options set."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from guarded_s3 import GuardedS3, Principal
from iam_policy import WRITES, Call, Policy
from patience import wait_until
from testbed import TILES, Command, losses, small_recipe

from jobs.run.directory import RunDirectory
from jobs.stack.record import Stack
from pipeline.store.storage import Storage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

IAM = Path(__file__).parents[3] / "infra" / "iam"
KMS_KEY = "arn:aws:kms:us-east-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
OPTIONS = {
    "CONVMAE_S3_REQUEST_PAYER": "requester",
    "CONVMAE_S3_KMS_KEY_ID": KMS_KEY,
    "CONVMAE_S3_KMS_BUCKET_KEY": "true",
    "CONVMAE_S3_ADDRESSING": "path",
}
INGEST, RUN = "AKIAINGEST", "AKIARUN"
SOURCES, DATASETS, RUNS = "s3://convmae/sources/policies", "s3://convmae/datasets/policies", "s3://convmae/runs"
RUN_NAME = "guarded"
EPOCHS = 12
LARGE_BYTES = 105 << 20
"""More than s3fs sends in one piece, as real shards and checkpoints are."""


def policy(name: str) -> Policy:
    names = {
        "BUCKET": "convmae",
        "REGION": "us-east-1",
        "ACCOUNT": "111122223333",
        "key/KEY": KMS_KEY.rpartition(":")[2],
    }
    return Policy(IAM / f"{name}.json", **names)


@dataclass
class Flow:
    """A store with guards, and those who work on it."""

    convmae: Command
    guard: GuardedS3

    def environment(self, key_id: str) -> dict[str, str]:
        """Of a shell of somebody."""
        keys = {"AWS_ACCESS_KEY_ID": key_id, "AWS_SECRET_ACCESS_KEY": "theirs", "AWS_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.guard.endpoint, **keys, **OPTIONS}

    def storage(self, key_id: str) -> Storage:
        """How somebody reaches the store."""
        return Storage.from_environment(self.environment(key_id))

    def ingest(self, *arguments: str) -> str:
        """A command with the rights of an ingest."""
        return self.convmae(*arguments, **self.environment(INGEST))[0]

    def run(self, *arguments: str) -> str:
        """A command with the rights of a run."""
        return self.convmae(*arguments, **self.environment(RUN))[0]

    def kill_at(self, operation: str, *arguments: str) -> None:
        """Start a command with the rights of a run, and kill it when it asks for an operation."""
        came: list[Call] = []

        def hold(call: Call, headers: Mapping[str, str]) -> tuple[int, str] | None:
            if call.operation == "UploadPart":
                time.sleep(2.5)  # a journal is written every two seconds
            if call.operation == operation:
                came.append(call)
                return 503, "SlowDown"
            return None

        self.guard.meddle = hold
        process = self.convmae.start(*arguments, **self.environment(RUN))
        try:
            wait_until(operation, lambda: bool(came), 300)
        finally:
            process.kill()
            process.communicate()
            self.guard.meddle = lambda call, headers: None


@pytest.fixture(scope="module")
def flow(
    convmae: Command, local_stack: Stack, photographs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Flow]:
    """After ingest, training, stop, resume, consolidation with kills, prune and export."""
    server = Storage.from_environment(local_stack.environment())
    for name in Storage().list_files(str(photographs)):
        server.upload(photographs / name, f"{SOURCES}/photographs/{name}")
    ingest = Principal(policies=(policy("ingest"), policy("kms")))
    run = Principal(policies=(policy("run"), policy("kms")))
    guard = GuardedS3(server, principals={INGEST: ingest, RUN: run}, kms_key=KMS_KEY)
    with guard.running():
        flow = Flow(convmae, guard)
        make_data(flow, server)
        train(flow)
        keep_weights(flow)
        send_large_files(flow, tmp_path_factory.mktemp("large") / "file")
        yield flow


def make_data(flow: Flow, server: Storage) -> None:
    flow.ingest("shard", f"{SOURCES}/photographs", f"{DATASETS}/sharded", "--samples-per-shard", "40")
    flow.ingest("shard", f"{SOURCES}/photographs", f"{DATASETS}/sharded", "--samples-per-shard", "40")
    for name in server.list_names(f"{DATASETS}/sharded"):
        if name.endswith(".tar"):
            server.write(f"{DATASETS}/foreign/{name}", server.read(f"{DATASETS}/sharded/{name}"))
            server.write(f"{SOURCES}/tars/{name}", server.read(f"{DATASETS}/sharded/{name}"))
    flow.ingest("index", f"{DATASETS}/foreign")
    flow.ingest("shard", f"{SOURCES}/tars", f"{DATASETS}/again", "--samples-per-shard", "40")
    assert "0 faults" in flow.ingest("verify", f"{DATASETS}/foreign", "--deep")


def train(flow: Flow) -> None:
    recipe = small_recipe(
        f"{DATASETS}/sharded",
        run_root=RUNS,
        epochs=EPOCHS,
        checkpoint_every_steps=8,
        milestone_epochs=[2],
        keep_checkpoints=1,
        max_workers=1,
    )
    root = ("--run-root", RUNS)
    run = flow.convmae.run(RUN_NAME)
    first = flow.convmae.start("pretrain", *recipe, "--run", RUN_NAME, **flow.environment(RUN))
    try:
        wait_until("a step", lambda: bool(run.read_heartbeat().get("loss")) or first.poll() is not None, 600)
        # What `convmae stop` does, which takes seconds to start.
        RunDirectory.of(flow.storage(RUN), RUNS, RUN_NAME).write_stop_request()
        out, err = first.communicate(timeout=600)
    finally:
        first.kill()
    assert first.returncode == 0, out + err
    flow.run("pretrain", *recipe, "--run", RUN_NAME)
    assert len(losses(run)) == EPOCHS * TILES // 12
    for command in (("status", RUN_NAME), ("history", RUN_NAME), ("checkpoints", RUN_NAME, "--verify"), ("list",)):
        flow.run(*command, *root)
    flow.run("doctor", "--store", RUNS)


def keep_weights(flow: Flow) -> None:
    weights = ("consolidate", RUN_NAME, "--force", "--run-root", RUNS)
    flow.kill_at("UploadPart", *weights)  # leaves an upload that nobody can go on with
    flow.kill_at("CompleteMultipartUpload", *weights)  # leaves one with a journal
    flow.run(*weights)
    flow.run("export", RUN_NAME, "--format", "official", "--run-root", RUNS)
    flow.run("prune", RUN_NAME, "--keep", "1", "--yes", "--run-root", RUNS)


def send_large_files(flow: Flow, file: Path) -> None:
    """One of the size of real ones, whose upload fails once, under the names of both."""
    with file.open("wb") as sparse:
        sparse.truncate(LARGE_BYTES)
    for key_id, url in ((INGEST, f"{DATASETS}/large.tar"), (RUN, f"{RUNS}/{RUN_NAME}/large.pt")):
        flow.guard.meddle = fail_once("UploadPart", (500, "InternalError"))
        storage = flow.storage(key_id)
        storage.upload(file, url)
        assert storage.size(url) == LARGE_BYTES
        storage.delete(url)


def fail_once(operation: str, answer: tuple[int, str]) -> Callable[[Call, Mapping[str, str]], tuple[int, str] | None]:
    left = [answer]
    return lambda call, headers: left.pop() if call.operation == operation and left else None


def test_nothing_was_denied(flow: Flow) -> None:
    assert [str(need) for need in flow.guard.denied] == []


@pytest.mark.parametrize("name", ["ingest", "run", "kms"])
def test_nothing_is_granted_that_nobody_uses(flow: Flow, name: str) -> None:
    assert [str(grant) for grant in policy(name).grants if grant not in flow.guard.used] == []


def test_each_works_on_its_own_prefix_alone(flow: Flow) -> None:
    writes = (*WRITES, "DeleteObject", "AbortMultipartUpload")
    written = {
        (seen.key_id, seen.call.key.partition("/")[0]) for seen in flow.guard.seen if seen.call.operation in writes
    }

    assert written == {(INGEST, "datasets"), (RUN, "runs")}


def test_options_are_on_every_request_that_has_them(flow: Flow) -> None:
    ours = [seen for seen in flow.guard.seen if seen.call.operation != "HeadBucket"]
    assert {seen.call.operation for seen in ours} == {
        "GetObject",
        "HeadObject",
        "PutObject",
        "DeleteObject",
        "ListObjectsV2",
        "CreateMultipartUpload",
        "UploadPart",
        "CompleteMultipartUpload",
        "AbortMultipartUpload",
        "ListMultipartUploads",
        "ListParts",
    }
    for seen in ours:
        assert seen.headers.get("x-amz-request-payer") == "requester", seen
        begins = seen.call.operation in ("PutObject", "CreateMultipartUpload")
        encryption = ["aws:kms", KMS_KEY, "true"] if begins else [None] * 3
        prefix = "x-amz-server-side-encryption"
        names = (prefix, f"{prefix}-aws-kms-key-id", f"{prefix}-bucket-key-enabled")
        assert [seen.headers.get(name) for name in names] == encryption, seen
        assert seen.host == "127.0.0.1" and seen.path.startswith("/convmae"), seen


def test_a_right_that_is_missing_is_told_by_its_operation(flow: Flow) -> None:
    url = f"{DATASETS}/not-ours"
    with pytest.raises(ValueError, match="PutObject") as refused:
        flow.storage(RUN).check(url, write=True)
    assert "credentials: must be accepted by the storage" in str(refused.value)
    flow.guard.denied.clear()
