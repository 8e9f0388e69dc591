"""Faults that obstore reports, as the exceptions that s3fs would have raised; obstore tells most of them by text alone.

Read from the text are the answers and the breaks whose meaning cannot depend on who asked. Any other fault is None: the
caller asks s3fs the same, whose answer or exception counts. So a wording that is not understood costs a request, and
never changes what is reported.
"""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

from botocore import exceptions as boto
from botocore.parsers import ResponseParserError, create_parser

_DETAILS = "\n\nDebug source:"
_BEGINNINGS = (
    "Generic S3 error: ",
    "Request precondition failure for path {key}: ",
    "Object at location {key} not found: ",
)
_REQUEST = re.compile(r"Error performing GET (?P<url>\S+) in \S+ - (?P<fault>.*)", re.DOTALL)
_ANSWER = re.compile(r"Server returned non-2xx status code: (?P<status>\d{3})[^:\n]*: (?P<body>.*)", re.DOTALL)
_BODY_BROKE_OFF = re.compile(r"source: HttpError \{\s+kind: (Interrupted|Decode|Request|Unknown)")
_KIND = re.compile(r"HttpError \{\s+kind: (\w+)")
_NOT_CONNECTED = ('"dns error"', "kind: ConnectionRefused", "kind: HostUnreachable", "kind: NetworkUnreachable")
_FOR_BOTH = {HTTPStatus.NOT_FOUND, HTTPStatus.PRECONDITION_FAILED, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE}
_FOR_BOTH |= {HTTPStatus.TOO_MANY_REQUESTS}
_RETRIED_BY_BOTOCORE = (429, 500, 502, 503, 504)


def of_s3fs(error: Exception, key: str) -> Exception | None:
    """The exception of s3fs, botocore or aiohttp for one of obstore's; None where s3fs is to be asked.

    Answers of other statuses, redirects and refused signatures among them, depend on the request, which s3fs may make
    in another way: it follows a bucket to its region. TLS faults are told apart by Python's own library alone.

    Args:
        error: What obstore raised.
        key: Of the object; part of the text, and chosen by whoever wrote the object.
    """
    told, _, details = str(error).partition(_DETAILS)
    beginnings = (text.replace("{key}", key) for text in _BEGINNINGS)
    beginning = next((text for text in beginnings if told.startswith(text)), None)
    if beginning is None:
        return None
    request = _REQUEST.fullmatch(told.removeprefix(beginning))
    if request is None:
        return _broken_body(details)
    answer = _ANSWER.fullmatch(request["fault"])
    return _answered(int(answer["status"]), answer["body"]) if answer else _failed(request["url"], details)


def _answered(status: int, body: str) -> Exception | None:
    if status not in _FOR_BOTH and status < HTTPStatus.INTERNAL_SERVER_ERROR:
        return None
    from s3fs.errors import translate_boto_error

    answer = {"status_code": status, "headers": {}, "body": body.encode(), "context": {}}
    fault: Exception
    try:
        parsed: dict[str, Any] = create_parser("rest-xml").parse(answer, None)
    except ResponseParserError as error:
        fault = error
    else:
        if status in _RETRIED_BY_BOTOCORE:
            parsed["ResponseMetadata"] |= {"MaxAttemptsReached": True, "RetryAttempts": 0}  # its message says so
        fault = translate_boto_error(boto.ClientError(parsed, "GetObject"))
    return fault


def _failed(url: str, details: str) -> Exception | None:
    kind = found[1] if (found := _KIND.search(details)) else ""
    fault: Exception | None = None
    if kind == "Timeout":
        timeout = boto.ConnectTimeoutError if "Connect," in details else boto.ReadTimeoutError
        fault = timeout(endpoint_url=url)
    elif kind == "Connect" and any(sign in details for sign in _NOT_CONNECTED):
        fault = boto.EndpointConnectionError(endpoint_url=url)
    elif kind == "Request":
        fault = boto.ConnectionClosedError(endpoint_url=url)
    return fault


def _broken_body(details: str) -> Exception | None:
    fault: Exception | None = None
    if "kind: Timeout" in details:
        fault = boto.ReadTimeoutError(endpoint_url="body")
    elif _BODY_BROKE_OFF.search(details):
        fault = boto.ResponseStreamingError(error="the body broke off")
    return fault
