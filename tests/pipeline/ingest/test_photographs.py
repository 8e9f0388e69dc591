from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import SourceError
from pipeline.ingest.photographs import PHOTOGRAPHS, TILE_PIXELS, cut_tiles, photograph_path


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda photograph: photograph.name)
def test_every_photograph_is_there_in_colour_with_licence_and_credit(photograph) -> None:  # type: ignore[no-untyped-def]
    with Image.open(photograph_path(photograph)) as image:
        assert image.mode == "RGB"
        assert min(image.size) >= TILE_PIXELS[1]
    assert photograph.licence and photograph.credit


def test_tiles_are_square_spread_over_classes_and_reproducible(tmp_path: Path) -> None:
    first = cut_tiles(tmp_path / "a", 30, seed=1)
    again = cut_tiles(tmp_path / "b", 30, seed=1)
    other = cut_tiles(tmp_path / "c", 30, seed=2)

    assert len(first) == len(set(first)) == 30
    assert {path.parent.name for path in first} == {photograph.name for photograph in PHOTOGRAPHS}
    for path in first:
        with Image.open(path) as tile:
            assert tile.width == tile.height and TILE_PIXELS[0] <= tile.width <= TILE_PIXELS[1]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert [path.read_bytes() for path in first] != [path.read_bytes() for path in other]


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(SourceError, match=r"pip install 'convmae-pretrain\[local\]'"):
        photograph_path(PHOTOGRAPHS[0])
