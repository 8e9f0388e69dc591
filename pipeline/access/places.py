"""Names of places, by who chose them: what a user gave may lead anywhere, what a listing holds lies below its root.

Whoever may put an object into a bucket chooses its key, and keys like `/etc/passwd`, `http://host/x` and `../x` are
allowed there. So a listed name is no address, and mypy refuses one where a URL is wanted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.access.urls import BUCKETS, LOCAL, is_local, is_web, path_of, protocol_of, with_known_scheme
from pipeline.errors import RefusedError, StorageError


@dataclass(frozen=True, slots=True, order=True)
class Listed:
    """A name as a listing gave it: relative to what was listed, whatever it spells."""

    text: str

    def __str__(self) -> str:
        return self.text

    def url(self, root: str) -> str:
        """Its URL.

        Args:
            root: What was listed.

        Raises:
            RefusedError: No URL means exactly this name there: a client or server would look at another place.
        """
        url = f"{root.rstrip('/')}/{self.text}"
        why = self._obstacle(root, url)
        if why:
            raise RefusedError("name", "must mean one object below what was listed", self.text, why)
        return url

    def _obstacle(self, root: str, url: str) -> str:
        if {".", ".."} & {*self.text.split("/")}:
            return "its name has . or .. between slashes, which clients and servers resolve"
        if is_local(root) and (self.text.startswith("/") or "\0" in self.text):
            return "no file below the folder has such a name"
        try:
            means = path_of(url)
        except StorageError as error:
            return f"its name {error.rule}"
        if means == f"{path_of(root).rstrip('/')}/{self.text}":
            return ""
        ends = self.text.endswith("/")
        return "its name ends in a slash" if ends else "the store's client would look for another name"


@dataclass(frozen=True, slots=True, order=True)
class Given:
    """A path or URL as a user wrote it: on a command line, in a recipe, in a list of files."""

    text: str

    def __str__(self) -> str:
        return self.text

    def url(self, folder: str) -> str:
        """The URL that it means, exactly: on a store two slashes in a row are not one.

        Args:
            folder: What a relative path is relative to.

        Raises:
            StorageError: It is no URL, or leads from a store to files of this machine.
        """
        text = with_known_scheme(self.text)
        is_here = protocol_of(text) in LOCAL
        scheme, separator, rest = text.partition("://")
        if separator and not is_here:
            if scheme in BUCKETS and (not rest or rest.startswith("/")):
                raise StorageError("URL", "must name a bucket", text, f"write {scheme}://bucket/folder")
            return text
        path = rest if separator else text
        path = _from_home(path.removeprefix("localhost") if separator and path.startswith("localhost/") else path)
        if is_local(folder):  # whose path is asked for where it matters alone: the working folder may be gone
            return str(Path(path) if path.startswith("/") else Path(path_of(folder), path))
        if separator or path.startswith("/"):
            remedy = "copy what names it to this machine, or name a place in a store"
            raise StorageError("URL", f"must not lead from {folder} to files of this machine", self.text, remedy)
        return _below(folder, path)


def normal(url: str) -> str:
    """The one way in which a place of ours is written: a dataset, a run, a file of weights.

    A local path is absolute and has no scheme. Slashes at the end and slashes in a row do not count, nor does whether
    a scheme is in capitals; `s3a` and `s3n` are `s3`.

    Raises:
        StorageError: It is no URL.
    """
    place = Given(url).url(os.curdir)
    if is_local(place):
        plain = os.path.realpath(place) if ".." in place.split("/") else os.path.abspath(place)  # noqa: PTH100
        return "/" + plain.lstrip("/")
    if is_web(place):
        return place if "?" in place else place.rstrip("/")
    scheme, _, rest = place.partition("://")
    host, _, path = rest.partition("/")
    parts = [part for part in path.split("/") if part]
    if {".", ".."} & {*parts}:
        resolved = os.path.normpath(f"/{'/'.join(parts)}").lstrip("/")
        raise StorageError("URL", "must have no . or .. in it", url, f"write {scheme}://{host}/{resolved}")
    return "/".join([f"{scheme}://{host}", *parts])


def is_place(text: str) -> bool:
    """Whether a person means a path or URL by it, rather than a run's name."""
    return "/" in text or text in (".", "..", "~")


def _from_home(path: str) -> str:
    if path != "~" and not path.startswith("~/"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        rule = "must not begin with ~ where no home folder is known"
        raise StorageError("URL", rule, path, "write the whole path") from None


def _below(folder: str, path: str) -> str:
    """A relative path in a store, which resolves nothing itself."""
    place = folder.rstrip("/")
    while path.startswith(("./", "../")):
        step, _, path = path.partition("/")
        if step == "..":
            if "/" not in place.partition("://")[2]:
                raise StorageError("URL", f"must lead to a place in the store of {folder}", path, "write the whole URL")
            place = place.rpartition("/")[0]
    return f"{place}/{path}"
