"""Options of requests to S3: who pays, how objects are encrypted, how buckets are addressed, what reads bodies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import StorageError, clipped

REQUEST_PAYER = "CONVMAE_S3_REQUEST_PAYER"
KMS_KEY_ID = "CONVMAE_S3_KMS_KEY_ID"
KMS_BUCKET_KEY = "CONVMAE_S3_KMS_BUCKET_KEY"
ADDRESSING = "CONVMAE_S3_ADDRESSING"
READER = "CONVMAE_S3_READER"
VARIABLES = (REQUEST_PAYER, KMS_KEY_ID, KMS_BUCKET_KEY, ADDRESSING, READER)
S3FS = "s3fs"
OBSTORE = "obstore"

_ADDRESSING = ("path", "virtual", "auto")
_BOOLEANS = {"true": True, "false": False}
_KMS_KEY = re.compile(
    r"""(mrk-[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|alias/[\w/-]{1,250}"""
    r"""|arn:aws[\w-]*:kms:[\w-]+:\d{12}:(key|alias)/[\w/-]{1,250})"""
)


@dataclass(frozen=True)
class S3Options:
    """Options that reach every request for which S3 has them.

    Raises:
        StorageError: A value that S3 does not know; names the variable that it is set by.
    """

    requester_pays: bool = False
    """Accept charges for requests to a bucket whose owner wants that."""
    kms_key_id: str | None = None
    """Id, ARN or alias of the KMS key that encrypts what is written; None leaves it to the bucket."""
    kms_bucket_key: bool | None = None
    """Whether the bucket's own key saves most requests to KMS; None leaves it to the bucket."""
    addressing: str | None = None
    """`path`, `virtual` or `auto`; None leaves it to botocore, which reads `s3.addressing_style` of a profile."""
    reader: str = S3FS
    """What fetches the bodies of objects: `s3fs`, or `obstore`, which takes less CPU time."""

    def __post_init__(self) -> None:
        if self.kms_key_id is not None and not _KMS_KEY.fullmatch(self.kms_key_id):
            remedy = "write its id, its ARN, or alias/NAME (alias/aws/s3 is AWS' own)"
            raise StorageError(KMS_KEY_ID, "must name a KMS key", clipped(self.kms_key_id), remedy)
        if self.kms_bucket_key is not None and self.kms_key_id is None:
            remedy = f"set {KMS_KEY_ID}, or unset {KMS_BUCKET_KEY}"
            raise StorageError(KMS_BUCKET_KEY, "must come with a key", self.kms_bucket_key, remedy)
        if self.addressing is not None and self.addressing not in _ADDRESSING:
            remedy = f"write one of {', '.join(_ADDRESSING)}, or unset it"
            raise StorageError(ADDRESSING, "must be a way to address buckets", clipped(self.addressing), remedy)
        if self.reader not in (S3FS, OBSTORE):
            raise StorageError(READER, f"must be {S3FS} or {OBSTORE}", clipped(self.reader), "correct it, or unset it")

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> S3Options:
        """Read VARIABLES; one that is empty counts as absent."""
        payer, bucket_key = environ.get(REQUEST_PAYER) or None, environ.get(KMS_BUCKET_KEY) or None
        if payer not in (None, "requester"):
            raise StorageError(REQUEST_PAYER, "must be requester", clipped(payer or ""), "correct it, or unset it")
        if bucket_key is not None and bucket_key not in _BOOLEANS:
            raise StorageError(KMS_BUCKET_KEY, "must be true or false", clipped(bucket_key), "correct it, or unset it")
        return cls(
            requester_pays=payer is not None,
            kms_key_id=environ.get(KMS_KEY_ID) or None,
            kms_bucket_key=None if bucket_key is None else _BOOLEANS[bucket_key],
            addressing=environ.get(ADDRESSING) or None,
            reader=environ.get(READER) or S3FS,
        )

    @property
    def call_arguments(self) -> dict[str, Any]:
        """Arguments for s3fs, which gives each to the operations that take it."""
        if self.kms_key_id is None:
            return {}
        bucket_key = {} if self.kms_bucket_key is None else {"BucketKeyEnabled": self.kms_bucket_key}
        return {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": self.kms_key_id, **bucket_key}

    @property
    def client_settings(self) -> dict[str, Any]:
        """Settings for botocore's configuration of a client."""
        return {} if self.addressing is None else {"s3": {"addressing_style": self.addressing}}
