from __future__ import annotations

import io
import json
import tarfile

import pytest
from pipeline_tars import Members, ranged, tar_bytes

from pipeline.image.photo import CorruptImage
from pipeline.shard.tar_samples import (
    IMAGE_EXTENSIONS,
    MOST_SKIPPED,
    Measured,
    TarContents,
    read_samples,
    sample_key,
    unread_kinds,
)


def contents(members: Members, **options: object) -> TarContents:
    return read_samples(ranged(tar_bytes(members)), **({"salvage": False} | options))  # type: ignore[arg-type]


def test_the_order_of_a_samples_members_does_not_matter() -> None:
    members = [("a.jpg", b"A"), ("a.cls", b"1"), ("b.cls", b"2"), ("b.txt", b"words"), ("b.JPEG", b"BB")]
    for order in (members, members[::-1], sorted(members, key=lambda member: member[0][-1])):
        found = contents(order)

        assert {(image.key, image.extension, image.length, image.label) for image in found.images} == {
            ("a", "jpg", 1, 1),
            ("b", "JPEG", 2, 2),
        }


def test_offsets_lead_to_the_images() -> None:
    data = tar_bytes([(f"{n}.jpg", bytes([n]) * n) for n in range(1, 9)])

    images = read_samples(ranged(data), salvage=False).images

    assert [data[image.offset : image.offset + image.length] for image in images] == [
        bytes([n]) * n for n in range(1, 9)
    ]


@pytest.mark.parametrize(
    ("label", "expected", "bad"),
    [
        ({"cls": b"7"}, 7, 0),
        ({"cls": b" 7\n"}, 7, 0),
        ({"cls": b"cat"}, None, 1),
        ({"cls": b"-3"}, None, 1),
        ({"cls": b""}, None, 1),
        ({"cls": str(2**63).encode()}, None, 1),
        ({"json": json.dumps({"label": 9}).encode()}, 9, 0),
        ({"json": json.dumps({"cls": 8, "label": 9}).encode()}, 8, 0),
        ({"json": json.dumps({"label": "cat"}).encode()}, None, 0),
        ({"json": json.dumps({"label": True}).encode()}, None, 0),
        ({"json": json.dumps({"label": 1.0}).encode()}, None, 1),
        ({"json": json.dumps({"cls": 1.5, "label": 9}).encode()}, 9, 0),
        ({"cls": b"1.0"}, None, 1),
        ({"cls": b"-1"}, None, 1),
        ({"cls": b"cat"}, None, 1),
        ({"json": b"[1, 2]"}, None, 0),
        ({"json": b"{broken"}, None, 1),
        ({"json": b'{"label": 1}', "cls": b"2"}, 2, 0),
        ({"txt": b"5"}, None, 0),
    ],
)
def test_labels_are_integers_of_cls_or_json(label: dict[str, bytes], expected: int | None, bad: int) -> None:
    members = [("a.jpg", b"A"), *((f"a.{kind}", data) for kind, data in label.items())]
    for order in (members, members[::-1]):
        found = contents(order)

        assert [image.label for image in found.images] == [expected]
        assert found.bad_labels == bad


def test_a_sample_with_several_images_has_the_plain_one() -> None:
    found = contents([("a.seg.png", b"1"), ("a.png", b"2"), ("a.thumb.jpg", b"3"), ("a.jpg", b"4"), ("b.png", b"5")])

    assert [image.member for image in found.images] == ["a.jpg", "b.png"]


def test_images_with_dots_in_their_names_are_not_lost() -> None:
    found = contents([("x/IMG.1.jpg", b"1"), ("x/IMG.1.cls", b"11"), ("x/IMG.2.jpg", b"2"), ("x/IMG.2.cls", b"22")])

    assert [(image.key, image.extension, image.label) for image in found.images] == [
        ("x/IMG", "1.jpg", 11),
        ("x/IMG", "2.jpg", 22),
    ]


def test_what_webdataset_ignores_is_ignored() -> None:
    found = contents(
        [("__meta__/x.jpg", b"1"), (".hidden.jpg", b"2"), ("x/._a.jpg", b"3"), ("noext", b"4"), ("a.jpg", b"5")]
    )

    assert [image.member for image in found.images] == ["a.jpg"]


def test_images_that_cannot_be_used_are_listed_with_their_place() -> None:
    def measure(data: bytes) -> Measured:
        if data == b"bad":
            raise CorruptImage("it is bad")
        return Measured(len(data), 3, 4)

    found = contents([("a.jpg", b"good"), ("b.jpg", b"bad"), ("a.jpg", b"again")], measure=measure)

    assert [(image.key, image.measured) for image in found.images] == [("a", Measured(4, 3, 4))]
    assert [(item.path, item.reason) for item in found.skipped] == [
        ("b.jpg at byte 1536", "it is bad"),
        ("a.jpg at byte 2560", "its name was used before in this tar"),
    ]


def test_a_giant_is_not_taken_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shard.tar_samples.LARGEST_IMAGE_BYTES", 1000)

    found = contents([("a.jpg", bytes(1001)), ("b.jpg", bytes(1000))])

    assert [image.key for image in found.images] == ["b"]
    assert "1001 bytes" in found.skipped[0].reason


@pytest.mark.parametrize("name", ["a.jpg", "x.y/a.b.jpg", "./a.cls", "x/y/a.tar.gz"])
def test_keys_are_webdatasets(name: str) -> None:
    from webdataset.tariterators import base_plus_ext

    assert sample_key(name) == base_plus_ext(name)[0]


def test_links_named_like_images_or_labels_are_skipped_and_listed() -> None:
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name, target in (("a.jpg", ""), ("b.jpg", "a.jpg"), ("a.cls", "b.cls")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = (tarfile.SYMTYPE, target) if target else (tarfile.REGTYPE, "")
            tar.addfile(member)

    found = read_samples(ranged(output.getvalue()), salvage=False)

    assert [(image.member, image.label) for image in found.images] == [("a.jpg", None)]
    assert [item.reason for item in found.skipped] == ["it is a link to a.jpg"]
    assert found.bad_labels == 0


@pytest.mark.parametrize("extension", [*IMAGE_EXTENSIONS, "JPE", "Jfif"])
def test_every_extension_of_an_image_is_read(extension: str) -> None:
    assert [image.member for image in contents([(f"a.{extension}", b"A")]).images] == [f"a.{extension}"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("3.heic", ".heic"),
        ("x/4.JXL", ".JXL"),
        ("5.image", ".image"),
        ("6.pyd", ".pyd"),
        ("7.jpg.gz", ".jpg.gz"),
        ("8.jp2", ".jp2"),
        ("9.npy", ".npy"),
        ("10.cr2", ".cr2"),
        ("v1.0/IMG_11", "no extension"),
    ],
)
@pytest.mark.parametrize("salvage", [False, True])
def test_a_sample_without_an_image_that_is_read_is_reported(name: str, kind: str, salvage: bool) -> None:
    stem = sample_key(name)
    members = [(f"{stem}.json", b"{}"), (name, b"x"), ("a.jpg", b"A"), (f"{stem}.txt", b"caption")]

    found = contents(members, salvage=salvage)

    assert [image.member for image in found.images] == ["a.jpg"]
    (skipped,) = found.skipped
    assert skipped.path.startswith(f"{name} at byte ")
    assert kind in skipped.reason
    assert unread_kinds(found.skipped) == f"1 samples have no image that is read ({kind} 1)"


@pytest.mark.parametrize(
    "beside", ["a.json", "a.txt", "a.cls", "a.npy", "a.seg.heic", "a.jxl", "a", "b.json", "b.txt", "b.xml", ".DS_Store"]
)
def test_what_stands_beside_an_image_or_is_text_is_not_reported(beside: str) -> None:
    for members in ([("a.jpg", b"A"), (beside, b"1")], [(beside, b"1"), ("a.jpg", b"A")]):
        assert contents(members).skipped == []


def test_a_sample_whose_image_is_corrupt_is_reported_once() -> None:
    def corrupt(data: bytes) -> Measured:
        raise CorruptImage("no")

    found = contents([("a.heic", b"x"), ("a.jpg", b"A")], measure=corrupt)

    assert [item.reason for item in found.skipped] == ["no"]


def test_kinds_are_counted_most_frequent_first_and_not_without_end() -> None:
    members = [(f"{n}.k{n % 30}", b"") for n in range(60)] + [("x.heic", b"")] * 1 + [("y.heic", b""), ("z.heic", b"")]

    summary = unread_kinds(contents(members).skipped)

    assert summary.startswith("63 samples have no image that is read (.heic 3, ") and summary.endswith(
        "and 11 more kinds)"
    )


def test_of_very_many_samples_without_image_a_bounded_number_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.shard.tar_samples.MOST_SKIPPED", 10)

    found = contents([(f"{n}.npy", b"") for n in range(50)] + [("a.jpg", b"A")])

    assert MOST_SKIPPED == 100_000 and len(found.skipped) == 11
    assert (len(found.images), found.faults) == (1, [])
