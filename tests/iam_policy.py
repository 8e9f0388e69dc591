"""IAM policies: the rights that AWS requires for a call to S3, and whether a policy grants them.

Sources: Amazon S3 User Guide, "Required permissions for Amazon S3 API operations"; Service Authorization Reference,
"Actions, resources, and condition keys for Amazon S3" (s3:prefix is known to s3:ListBucket alone); GetObject and
HeadObject: who may not list gets 403 for what is not there, and the key counts as the prefix
(https://github.com/ceph/ceph/pull/68577 found AWS to do so); IAM User Guide, "How IAM evaluates": what no statement
allows is denied.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

WRITES = ("PutObject", "CreateMultipartUpload", "UploadPart", "CompleteMultipartUpload")
_OF_OBJECTS = {
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    **dict.fromkeys(WRITES, "s3:PutObject"),
    "DeleteObject": "s3:DeleteObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "ListParts": "s3:ListMultipartUploadParts",
}
_OF_BUCKETS = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "ListMultipartUploads": "s3:ListBucketMultipartUploads",
}


@dataclass(frozen=True)
class Call:
    """The S3 operation of a request."""

    operation: str
    bucket: str
    key: str = ""
    prefix: str | None = None
    """Of a listing; None if the request names none."""

    @classmethod
    def of(cls, method: str, path: str, query: str) -> Call:
        """The operation of a request in path style; fails on requests that we should never send.

        Args:
            method: Of HTTP.
            path: Unquoted.
            query: As it came.
        """
        bucket, _, key = path.lstrip("/").partition("/")
        names = parse_qs(query, keep_blank_values=True)
        operation = _operation(method, bool(key), names.keys())
        return cls(operation, bucket, key, names.get("prefix", [None])[0] if operation in _OF_BUCKETS else None)

    def needs(self, *, is_missing: bool = False, kms_key: str = "") -> list[Need]:
        """The rights that AWS requires for it.

        Args:
            is_missing: Whether the object does not exist, which is to be reported.
            kms_key: ARN of the key by which the object is encrypted; empty: by none.
        """
        bucket = f"arn:aws:s3:::{self.bucket}"
        if self.operation in _OF_BUCKETS:
            context = (
                {"s3:prefix": self.prefix} if self.operation == "ListObjectsV2" and self.prefix is not None else {}
            )
            return [Need(_OF_BUCKETS[self.operation], bucket, context)]
        needs = [Need(_OF_OBJECTS[self.operation], f"{bucket}/{self.key}")]
        if is_missing:
            needs.append(Need("s3:ListBucket", bucket, {"s3:prefix": self.key}))
        if kms_key and self.operation in (*WRITES, "GetObject"):
            actions = {"GetObject": ["kms:Decrypt"], "PutObject": ["kms:GenerateDataKey"]}
            both = ["kms:GenerateDataKey", "kms:Decrypt"]  # of every operation of an upload in parts
            needs += [Need(action, kms_key) for action in actions.get(self.operation, both)]
        return needs


def _operation(method: str, has_key: bool, names: Any) -> str:
    if not has_key:
        found = {
            "GET": "ListMultipartUploads" if "uploads" in names else "ListObjectsV2" if "list-type" in names else "",
            "HEAD": "HeadBucket",
        }.get(method, "")
    elif method == "GET":
        found = "ListParts" if "uploadId" in names else "" if names & {"acl", "tagging"} else "GetObject"
    else:
        found = {
            "HEAD": "HeadObject",
            "PUT": "UploadPart" if "partNumber" in names else "" if names & {"acl", "tagging"} else "PutObject",
            "POST": "CreateMultipartUpload" if "uploads" in names else "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload" if "uploadId" in names else "DeleteObject",
        }.get(method, "")
    assert found, f"no operation of ours: {method} {'key' if has_key else 'bucket'} {sorted(names)}"
    return found


@dataclass(frozen=True)
class Need:
    """One right."""

    action: str
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.action} on {self.resource} {dict(self.context) or ''}".strip()


@dataclass(frozen=True)
class Grant:
    """One action of one statement on one resource, under one value of its condition: the smallest removable part."""

    sid: str
    action: str
    resource: str
    prefix: str | None

    def covers(self, need: Need) -> bool:
        """Whether it alone allows it."""
        if self.action != need.action or not fnmatchcase(need.resource, _literal(self.resource)):
            return False
        told = need.context.get("s3:prefix")
        return self.prefix is None or (told is not None and fnmatchcase(told, _literal(self.prefix)))


class Policy:
    """A policy of Allow statements, by what each part of it allows."""

    def __init__(self, path: Path, **names: str) -> None:
        """Read it.

        Args:
            path: JSON.
            names: What is put in for the words in capitals that are the reader's to replace.
        """
        text = path.read_text()
        for word, name in names.items():
            text = text.replace(word, name)
        self.grants = list(_grants(json.loads(text)))

    def granting(self, need: Need) -> list[Grant]:
        """Its parts that allow `need`; empty if it is denied."""
        return [grant for grant in self.grants if grant.covers(need)]


def _grants(document: Mapping[str, Any]) -> Iterator[Grant]:
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
        assert statement["Effect"] == "Allow"
        conditions = statement.get("Condition", {})
        assert set(conditions) <= {"StringLike"} and set(conditions.get("StringLike", {})) <= {"s3:prefix"}
        prefixes = _list(conditions["StringLike"]["s3:prefix"]) if conditions else [None]
        for action in _list(statement["Action"]):
            assert "*" not in action
            for resource in _list(statement["Resource"]):
                yield from (Grant(statement["Sid"], action, resource, prefix) for prefix in prefixes)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _literal(pattern: str) -> str:
    """IAM knows only * and ?."""
    return pattern.replace("[", "[[]")
