"""Which tars can be indexed, before any is read."""

from __future__ import annotations

import pytest

from jobs.data.index import index_dataset
from pipeline.access.places import Listed
from pipeline.errors import SourceError
from pipeline.ingest.source import Tar, Tars
from pipeline.store.storage import Storage


@pytest.mark.parametrize("name", ["/x.tar", "a/../x.tar", "byurl/http://127.0.0.1:1/x.tar", "./x.tar"])
def test_a_tar_whose_name_would_lead_away_is_refused_before_any_is_read(name: str) -> None:
    tars = Tars("memory://tars-of-a-stranger", (Tar(Listed("fine.tar"), 1024), Tar(Listed(name), 1024)))

    with pytest.raises(SourceError, match="tar: must have a name that is a path below memory://tars-of-a-stranger"):
        index_dataset(Storage(), tars, "memory://tars-of-a-stranger", on_progress=lambda stage, progress: None)

    assert Storage().list_files("memory://tars-of-a-stranger") == {}
