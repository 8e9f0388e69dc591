"""Features of a dataset's samples as one file for other tools: Parquet or NumPy's npz."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jobs.errors import EvaluationError
from jobs.evaluate.encoder import Float32s
from jobs.evaluate.labels import indexes
from pipeline.host.scratch import scratch_folder
from pipeline.load.dataset import Dataset
from pipeline.shard.index import NO_LABEL
from pipeline.store.storage import Storage

ROW_GROUP_SAMPLES = 8192
METADATA_NAME = "convmae"

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """All samples of a dataset, by id from 0."""

    keys: Sequence[str]
    labels: Int64s
    """NO_LABEL where there is none."""
    classes: tuple[str, ...]
    """Names of the labels; empty where they are numbers."""
    features: Float32s
    """(n, C)."""
    about: Mapping[str, Any]
    """Weights, model and dataset, as plain values."""


def keys_and_labels(dataset: Dataset) -> tuple[list[str], Int64s]:
    """Of all samples, by id; what is no UTF-8 in a key is escaped."""
    keys, labels = list[str](), [np.empty(0, np.int64)]
    for index in indexes(dataset):
        keys += [key.decode("utf-8", "backslashreplace") for key in index.table["key"].tolist()]
        labels.append(index.table["label"])
    return keys, np.concatenate(labels)


def check_suffix(url: str) -> None:
    """Refuse a file of another format.

    Raises:
        EvaluationError: It is neither of the two.
    """
    if not url.endswith((".parquet", ".npz")):
        raise EvaluationError("OUT", "must end in .parquet or .npz", url, "write it like features.parquet")


def write_features(storage: Storage, url: str, table: FeatureTable) -> int:
    """Write a file whole or not at all; returns its bytes. The same table gives the same bytes.

    Args:
        storage: Reaches `url`.
        url: Ends in one of the two suffixes.
        table: What it holds.
    """
    with scratch_folder() as folder:
        path = Path(folder, "features")
        (_write_parquet if url.endswith(".parquet") else _write_npz)(path, table)
        storage.upload(path, url)
        return path.stat().st_size


def _write_npz(path: Path, table: FeatureTable) -> None:
    with path.open("wb") as file:
        np.savez(
            file,
            id=np.arange(len(table.labels)),
            key=np.array(table.keys, dtype=np.str_),
            label=table.labels,
            classes=np.array(table.classes, dtype=np.str_),
            features=table.features,
            about=np.array(json.dumps(table.about, sort_keys=True)),
        )


def _write_parquet(path: Path, table: FeatureTable) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    has_label = table.labels != NO_LABEL
    names = dict(enumerate(table.classes))
    columns = {
        "id": pa.array(np.arange(len(table.labels))),
        "key": pa.array(table.keys, pa.string()),
        "label": pa.array(table.labels, pa.int64(), mask=~has_label),
        "class": pa.array(map(names.get, table.labels.tolist()), pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(table.features.ravel()), table.features.shape[1]),
    }
    about = json.dumps(table.about, sort_keys=True)
    made = pa.table(columns).replace_schema_metadata({METADATA_NAME: about})
    parquet.write_table(made, path, row_group_size=ROW_GROUP_SAMPLES, compression="zstd")
