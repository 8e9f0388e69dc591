from __future__ import annotations

from jobs.consolidation.consolidate_command import progress_text, result_line
from jobs.consolidation.target import ConsolidatedWeights, WrittenFile
from jobs.consolidation.writer import ConsolidationProgress


def test_the_rate_and_the_rest_are_shown_without_what_was_kept() -> None:
    now = ConsolidationProgress(done=30, total=50, bytes=200_000_000, kept=10)

    assert progress_text(now, seconds=4.0) == "200 MB · 50.0 MB/s · ETA 4s"
    assert progress_text(ConsolidationProgress(done=10, total=50, kept=10), seconds=4.0) == "0 B · 0 B/s · ETA -"


def test_one_file_is_shown_with_its_checksum_and_several_with_their_number() -> None:
    file = WrittenFile("s3://b/one.safetensors", 352_000_000, "0123456789abcdef0123")

    one = result_line(ConsolidatedWeights(file.url, 7, (file,), seconds=3.2))
    several = result_line(ConsolidatedWeights("s3://b/folder", 7, (file, file), kept=1, seconds=3.2))

    assert one == "step 7: s3://b/one.safetensors (352 MB, sha256 0123456789abcdef…) in 3s"
    assert several == "step 7: s3://b/folder (2 files, 1 of them kept, 704 MB) in 3s"


def test_what_was_kept_of_an_earlier_call_is_shown() -> None:
    file = WrittenFile("s3://b/one.safetensors", 352_000_000, "0123456789abcdef0123")

    one = result_line(ConsolidatedWeights(file.url, 7, (file,), kept_bytes=200_000_000, seconds=3.2))

    assert "(352 MB, 200 MB of an earlier call, sha256 0123456789abcdef…)" in one
