"""Files of features, read by the libraries whose formats they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from labelled_data import STORAGE
from pyarrow import parquet

from jobs.errors import EvaluationError
from jobs.evaluate.feature_files import FeatureTable, check_suffix, keys_and_labels, write_features
from pipeline.load.dataset import Dataset


@pytest.fixture
def table() -> FeatureTable:
    features = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    return FeatureTable(["a", "b", "ä", "d"], np.array([1, -1, 0, 1]), ("ant", "bee"), features, {"weights": "x"})


def test_parquet_has_a_row_for_each_sample(tmp_path: Path, table: FeatureTable) -> None:
    url = str(tmp_path / "out.parquet")

    assert write_features(STORAGE, url, table) == Path(url).stat().st_size

    found = parquet.read_table(url)
    assert found.column_names == ["id", "key", "label", "class", "features"]
    assert found["id"].to_pylist() == [0, 1, 2, 3]
    assert found["key"].to_pylist() == ["a", "b", "ä", "d"]
    assert found["label"].to_pylist() == [1, None, 0, 1]
    assert found["class"].to_pylist() == ["bee", None, "ant", "bee"]
    assert (np.array(found["features"].to_pylist(), np.float32) == table.features).all()
    assert json.loads(found.schema.metadata[b"convmae"]) == {"weights": "x"}


def test_npz_has_an_array_for_each_column(tmp_path: Path, table: FeatureTable) -> None:
    url = str(tmp_path / "out.npz")

    write_features(STORAGE, url, table)

    with np.load(url, allow_pickle=False) as found:
        assert found["id"].tolist() == [0, 1, 2, 3]
        assert found["key"].tolist() == ["a", "b", "ä", "d"]
        assert found["label"].tolist() == [1, -1, 0, 1]
        assert found["classes"].tolist() == ["ant", "bee"]
        assert (found["features"] == table.features).all()
        assert json.loads(found["about"].item()) == {"weights": "x"}


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_the_same_table_gives_the_same_bytes(tmp_path: Path, table: FeatureTable, suffix: str) -> None:
    urls = [str(tmp_path / f"{number}.{suffix}") for number in range(2)]

    for url in urls:
        write_features(STORAGE, url, table)

    assert Path(urls[0]).read_bytes() == Path(urls[1]).read_bytes()


def test_keys_and_labels_are_those_of_the_samples(dataset: Dataset) -> None:
    keys, labels = keys_and_labels(dataset)

    samples = dataset.read(np.arange(dataset.samples))
    assert keys == [sample.key for sample in samples]
    assert labels.tolist() == [sample.label for sample in samples]


def test_another_format_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"OUT: must end in \.parquet or \.npz"):
        check_suffix("s3://b/features.csv")
