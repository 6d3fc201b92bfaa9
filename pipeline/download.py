"""Files from the web."""

import re
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pixelgen.errors import StorageError
from pixelgen.store import on_disk

AGENT = {"User-Agent": "pixelgen"}
TIMEOUT = 60.0  # seconds without an answer
FAILURES = (OSError, HTTPException)  # urllib.error.URLError is an OSError


def download(url: str, target: Path, remedy: str, most: int | None = None) -> None:
    """Fetch a file. StorageError, with the remedy, if it cannot be had, is not whole, or larger than `most` bytes."""
    received = 0
    try:
        request = urllib.request.Request(url, headers=AGENT)
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer, on_disk(target), open(target, "wb") as file:
            while chunk := answer.read(1 << 20):
                received += len(chunk)
                if most is not None and received > most:
                    raise StorageError(f"{url} has more than {most} bytes, which it should not: {remedy}")
                file.write(chunk)
            length = answer.headers.get("Content-Length")
    except FAILURES as error:
        raise StorageError(f"{url} cannot be downloaded ({error}): {remedy}") from error
    if length is not None and received != int(length):
        raise StorageError(f"{url}: the answer ended after {received} of {length} bytes; try again")


class Stay(urllib.request.HTTPRedirectHandler):
    """Follow redirects on the same host alone, until a hash is stated: the Hub does so in the answer that leads to its
    storage, which names files otherwise."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        if "X-Linked-Etag" in headers or urlsplit(url).netloc != request.host:
            return None
        return urllib.request.Request(url, headers=AGENT, method=request.get_method())


def stated_hash(url: str, remedy: str) -> str:
    """By which the Hub names a file: the sha256 of a large one, the id of a small one as a blob of git. StorageError,
    with the remedy, if it cannot be had."""
    try:
        with urllib.request.build_opener(Stay).open(
                urllib.request.Request(url, headers=AGENT, method="HEAD"), timeout=TIMEOUT) as answer:
            headers = answer.headers
    except urllib.error.HTTPError as error:
        if not 300 <= error.code < 400:
            raise StorageError(f"{url} cannot be downloaded ({error}): {remedy}") from error
        headers = error.headers
    except FAILURES as error:
        raise StorageError(f"{url} cannot be downloaded ({error}): {remedy}") from error
    tags = [headers.get(name, "").strip('"') for name in ("X-Linked-Etag", "ETag")]
    for tag in tags:
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", tag):
            return tag
    raise StorageError(f"{url}: the host states no hash to check the file against")
