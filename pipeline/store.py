"""Where bytes lie: a prefix of an S3 bucket, behind the functions of `pixelgen.store`.

A name is a relative path. A reader sees the whole of what was written under a name, or nothing. Credentials, region
and endpoint come from the standard AWS environment and configuration files, and from nowhere else.
"""

import base64
import contextlib
import datetime
import functools
import hashlib
import io
import re
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar

from pixelgen.errors import StorageError
from pixelgen.files import atomic
from pixelgen.store import LocalStore, Store, on_disk

PART = 64 << 20  # bytes of a part of a large object; S3 allows 10,000 of them
ATTEMPTS = 8  # at every request, with a growing pause between them
PATIENCE = 60.0  # seconds without a byte, at each attempt
LARGEST_SKEW = 300  # seconds that the clock may be wrong: S3 refuses from 900 on
REMEDIES = {
    "NoSuchBucket": "create the bucket, or correct storage.root",
    "404": "create the bucket, or correct storage.root",
    "403": "these credentials may not use it: check the policy of the bucket",
    "AccessDenied": "these credentials may not do that: allow s3:ListBucket, GetObject, PutObject, DeleteObject, "
                    "AbortMultipartUpload and the listing of multipart uploads",
    "InvalidAccessKeyId": "the key is unknown there: check AWS_ACCESS_KEY_ID or AWS_PROFILE, and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret is wrong: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired: renew them and run again, finished work is kept",
    "InvalidToken": "the credentials are not valid there: check AWS_SESSION_TOKEN",
    "InvalidRange": "it is shorter than what was written: `python -m pipeline.verify` lists what is damaged",
    "RequestTimeTooSkewed": "the clock of this machine is wrong: synchronise it",
    "SlowDown": f"it stayed overloaded for {ATTEMPTS} attempts: run again later, finished work is kept",
}


def open_store(location: str) -> Store:
    """The store of `s3://bucket/prefix`, or of a directory."""
    if not location.startswith("s3://"):
        return LocalStore(Path(location))
    bucket, _, prefix = location.removeprefix("s3://").partition("/")
    return S3Store(bucket, prefix)


def valid_root(location: str) -> bool:
    """Whether this is an S3 location as `storage.root` wants it."""
    return re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.-]+)*", location, re.ASCII) is not None \
        and not {".", ".."} & {*location.split("/")}


@dataclass(frozen=True)
class S3Store:
    """A prefix of a bucket. S3 shows an object when all of it has arrived, so every write is atomic."""

    remote: ClassVar[bool] = True
    bucket: str
    prefix: str

    def key(self, name: str) -> str:
        return f"{self.prefix}/{name}" if self.prefix else name

    def uri(self, name: str = "") -> str:
        return f"s3://{self.bucket}/{self.key(name)}"

    def write(self, name: str, source: bytes | Path) -> None:
        with explained(self.uri(name)):
            if isinstance(source, Path) and source.stat().st_size > PART:
                self._write_parts(name, source)
                return
            data = source if isinstance(source, bytes) else source.read_bytes()
            client().put_object(Bucket=self.bucket, Key=self.key(name), Body=data, ContentMD5=md5(data))

    def uploads(self, prefix: str = "") -> list[tuple[str, str, datetime.datetime]]:
        """Name, id and beginning of the uploads in parts that have not been completed."""
        start = len(self.key(""))
        with explained(self.uri(prefix)):
            pages = client().get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket,
                                                                              Prefix=self.key(prefix))
            return [(upload["Key"][start:], upload["UploadId"], upload["Initiated"])
                    for page in pages for upload in page.get("Uploads", [])]

    def abort(self, name: str, upload: str) -> None:
        """Give up an upload and delete its parts."""
        with explained(self.uri(name)):
            client().abort_multipart_upload(Bucket=self.bucket, Key=self.key(name), UploadId=upload)

    def _write_parts(self, name: str, path: Path) -> None:
        """Upload in parts; those that an interrupted upload of the same content has left are not sent again."""
        where = {"Bucket": self.bucket, "Key": self.key(name)}
        unfinished = [upload for unfinished, upload, _ in self.uploads(name) if unfinished == name]
        where["UploadId"] = unfinished[-1] if unfinished else client().create_multipart_upload(**where)["UploadId"]
        pages = client().get_paginator("list_parts").paginate(**where) if unfinished else []
        sent = {part["PartNumber"]: part["ETag"] for page in pages for part in page.get("Parts", [])}
        parts: list[dict[str, Any]] = []
        with open(path, "rb") as file:
            while data := file.read(PART):
                number = len(parts) + 1
                if sent.get(number, "").strip('"') != hashlib.md5(data, usedforsecurity=False).hexdigest():
                    sent[number] = client().upload_part(**where, PartNumber=number, Body=data,
                                                        ContentMD5=md5(data))["ETag"]
                parts.append({"PartNumber": number, "ETag": sent[number]})
        client().complete_multipart_upload(**where, MultipartUpload={"Parts": parts})

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        sink = io.BytesIO()
        self._stream(name, sink, start, stop)
        return sink.getvalue()

    def fetch(self, name: str, target: Path) -> None:
        with on_disk(target), atomic(target) as file:
            self._stream(name, file)

    def _stream(self, name: str, sink: IO[bytes], start: int = 0, stop: int | None = None) -> None:
        """Receive an object, or a part of it; where a connection breaks off, the next attempt goes on. It is given up
        after so many in a row that have brought nothing."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError

        with explained(self.uri(name)):
            failures, reached = 0, 0
            while True:
                first, last = start + sink.tell(), "" if stop is None else stop - 1
                part = {"Range": f"bytes={first}-{last}"} if first or stop is not None else {}
                try:
                    body = client().get_object(Bucket=self.bucket, Key=self.key(name), **part)["Body"]
                    for chunk in body.iter_chunks(1 << 20):
                        sink.write(chunk)
                    return
                except (HTTPClientError, IncompleteReadError):
                    failures, reached = 1 if sink.tell() > reached else failures + 1, sink.tell()
                    if failures == ATTEMPTS:
                        raise
                    time.sleep(min(0.05 * 2**failures, 10))

    def size(self, name: str) -> int | None:
        return self.sizes(name).get(name)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        return {name: size for name, (size, _) in self.listing(prefix).items()}

    def listing(self, prefix: str = "") -> dict[str, tuple[int, datetime.datetime]]:
        """Size and time of the last change of every name that begins with `prefix`."""
        start = len(self.key(""))
        with explained(self.uri(prefix)):
            pages = client().get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.key(prefix))
            return {found["Key"][start:]: (found["Size"], found["LastModified"])
                    for page in pages for found in page.get("Contents", [])}

    def delete(self, name: str) -> None:
        with explained(self.uri(name)):
            client().delete_object(Bucket=self.bucket, Key=self.key(name))


@functools.cache
def client() -> Any:
    """This process's connection to S3; boto3 repeats what fails for a passing reason."""
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client("s3", config=Config(
        retries={"mode": "standard", "total_max_attempts": ATTEMPTS}, connect_timeout=10, read_timeout=PATIENCE,
        request_checksum_calculation="when_required", response_checksum_validation="when_required"))


def md5(data: bytes) -> str:
    """As S3 wants it beside what it is sent, to refuse what arrives changed."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """What boto3 raises, as a StorageError that names the object and the remedy; FileNotFoundError for none there."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except ClientError as error:
        code = str(error.response.get("Error", {}).get("Code"))
        if code == "NoSuchKey" or (code == "404" and error.operation_name == "GetObject"):  # its body cut off
            raise FileNotFoundError(f"{uri} is not there") from error
        raise StorageError(f"{uri}: {error}; {REMEDIES.get(code, 'run again, finished work is kept')}") from error
    except BotoCoreError as error:
        raise StorageError(f"{uri}: {error} Check AWS_ENDPOINT_URL, AWS_REGION, the credentials (AWS_PROFILE or "
                           "AWS_ACCESS_KEY_ID) and the network, then run again: finished work is kept") from error


def preflight(root: str) -> str:
    """Whether a run may rely on an S3 root: the bucket is there, what is written can be read and deleted, the clock is
    right -> a line about it. StorageError names what is wrong, within seconds."""
    from botocore.exceptions import ClientError

    store = open_store(root)
    assert isinstance(store, S3Store)
    with explained(root):
        answer = client().head_bucket(Bucket=store.bucket)["ResponseMetadata"]["HTTPHeaders"]
    versioning = "unknown"
    with contextlib.suppress(ClientError):  # a permission of its own, which nothing else here needs
        versioning = client().get_bucket_versioning(Bucket=store.bucket).get("Status", "off").lower()
    if "date" in answer:
        there = datetime.datetime.strptime(answer["date"], "%a, %d %b %Y %H:%M:%S GMT").replace(tzinfo=datetime.UTC)
        skew = abs((datetime.datetime.now(datetime.UTC) - there).total_seconds())
        if skew > LARGEST_SKEW:
            raise StorageError(f"{root}: this machine's clock is {skew:.0f} s off the storage's: synchronise it")
    probe, content = f"preflight/{uuid.uuid4().hex}", b"written, read and deleted before work starts"
    store.write(probe, content)
    if store.read(probe) != content:
        raise StorageError(f"{root}: what was written is not what is read back: it is no S3 to rely on")
    store.delete(probe)
    kept = "; old versions of deleted checkpoints are kept and cost: set a lifecycle rule"
    return f"{root} is writable, versioning {versioning}{kept if versioning == 'enabled' else ''}"
