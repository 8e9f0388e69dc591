from __future__ import annotations

import json

import pytest

from pipeline.store.json_text import parsed_json, parsed_object


@pytest.mark.parametrize("value", [None, True, 0, -1.5, 2**70, "\u00e9\u2028", [], [1, [2]], {"a": {"b": "c"}}])
def test_a_document_is_read_as_the_standard_library_reads_it(value: object) -> None:
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False, indent=2)):
        assert parsed_json(text) == parsed_json(text.encode()) == json.loads(text) == value


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"NaN",
        b'{"a": -Infinity}',
        b"[1] 2",
        b"\xff",
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 5000,
    ],
    ids=repr,
)
def test_what_is_no_document_is_a_value_error_however_it_fails_to_be_one(data: bytes) -> None:
    with pytest.raises(ValueError):
        parsed_json(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b"5", b'"{}"'])
def test_an_object_is_one(data: bytes) -> None:
    assert parsed_object(b'{"a": 1}') == {"a": 1}
    with pytest.raises(ValueError, match="no object, but"):
        parsed_object(data)
