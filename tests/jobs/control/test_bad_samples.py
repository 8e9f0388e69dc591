"""A run over a data set that is damaged: it stops by name, or continues and keeps a ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from testbed import Command, small_recipe

from pipeline.ingest.writer import tar_url
from pipeline.load.dataset import Dataset
from pipeline.store.storage import Storage

BAD = 50
FIELDS = {"epochs": 3, "checkpoint_every_steps": 10}


@pytest.fixture(scope="module")
def damaged(convmae: Command, data: str) -> str:
    """A copy of the photographs with one byte flipped in the image of one sample."""
    storage = Storage.from_environment(convmae.stack.environment())
    url = data + "-damaged"
    for name in storage.list_files(data):
        storage.write(Storage.join(url, name), storage.read(Storage.join(data, name)))
    (row,) = Dataset.open(storage, url).rows([BAD])
    place = tar_url(url, "shard-000001")
    content = bytearray(storage.read(place))
    content[row.row.offset + 50] ^= 1
    storage.write(place, bytes(content))
    return url


@pytest.mark.slow
def test_a_run_fails_on_an_altered_object_by_name_and_goes_on_when_told_to_skip(
    convmae: Command, damaged: str, tmp_path: Path
) -> None:
    recipe = small_recipe(damaged, cache_dir=tmp_path / "cache", **FIELDS)
    member = Dataset.open(Storage.from_environment(convmae.stack.environment()), damaged).rows([BAD])[0].row.member

    _, err = convmae("pretrain", *recipe, "--run", "bad-sample", code=1)
    (line,) = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert all(words in line for words in ("shard-000001.tar", "was replaced", "ETag", ".jpg at offset"))

    out, _ = convmae("pretrain", *recipe, "check_etags=false", "on_bad_sample=skip", "--run", "bad-sample")
    assert "finished" in out
    run = convmae.run("bad-sample")
    (row,) = run.read_quarantine()
    assert (row["id"], row["fault"], row["member"], row["attempt"]) == (BAD, "checksum", member, 2)
    rows = run.read_history()
    assert sum(row["substitutions"] for row in rows) in (2, 3)  # an epoch may leave the sample out
    assert {row["samples"].partition("-")[0] for row in rows} == {"12"}
    assert all(0 <= row["data_wait_seconds"] < 60 for row in rows)

    status = json.loads(convmae("status", "bad-sample", "--json")[0])
    assert status["quarantined"] == 1
    assert status["substitutions_total"] == sum(row["substitutions"] for row in rows)
    assert status["block_cache_hits_total"] > 0
    assert member in convmae("quarantine", "bad-sample")[0]
    assert json.loads(convmae("quarantine", "bad-sample", "--json")[0]) == row
