"""An S3 server for tests: OpenStack Swift in a process of its own, on loopback, its data in a directory."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Endpoint:
    """Where an S3 server is, and who may use it."""

    url: str
    access_key: str = "tests:tester"
    secret_key: str = "to-be-seen-nowhere"
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """The variables by which boto3, s3fs, pyarrow and DVC find the server, and nothing but the server."""
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": self.access_key,
                "AWS_SECRET_ACCESS_KEY": self.secret_key, "AWS_DEFAULT_REGION": self.region,
                "AWS_EC2_METADATA_DISABLED": "true", "no_proxy": "127.0.0.1"}

    def client(self, **config: Any) -> Any:
        """A boto3 client that asks once and waits 30 s, unless `config` (of botocore's Config) says otherwise."""
        import boto3
        from botocore.config import Config

        patience = {"retries": {"total_max_attempts": 1}, "connect_timeout": 30, "read_timeout": 30}
        return boto3.client("s3", endpoint_url=self.url, aws_access_key_id=self.access_key,
                            aws_secret_access_key=self.secret_key, region_name=self.region,
                            config=Config(**patience | config))


@dataclass(frozen=True)
class Bucket:
    """A bucket of one test."""

    endpoint: Endpoint
    name: str

    @property
    def url(self) -> str:
        return f"s3://{self.name}"

    def client(self) -> Any:
        """A boto3 client that talks to the server itself, whatever a proxy in front of it does to others."""
        return self.endpoint.client()


@contextmanager
def s3_server(directory: Path) -> Iterator[Endpoint]:
    """Run a server that keeps everything in `directory`, an existing one; it ends with the block or with this process.

    RuntimeError if the server does not start, with its log; or if the directory's file system is unfit.
    """
    try:
        os.setxattr(directory, "user.pixelgen", b"")
    except OSError as error:
        raise RuntimeError(f"{directory} cannot hold the S3 server's data, its file system has no extended attributes "
                           f"({error}): set TMPDIR or pytest's --basetemp to a directory that has") from None
    endpoint = Endpoint("")
    program = [sys.executable, "-P", str(Path(__file__).with_name("swift_process.py")), str(directory),
               endpoint.access_key, endpoint.secret_key]
    log = directory / "log"
    # A session of its own: Ctrl-C is for the tests, which may still need the server while they clean up.
    # Without its own name resolution, which nothing here needs, eventlet is imported in half the time.
    with open(log, "ab") as errors:
        process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                                   start_new_session=True, env=os.environ | {"EVENTLET_NO_GREENDNS": "yes"})
    assert process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"the S3 server did not start:\n{log.read_text()}")
        yield replace(endpoint, url=f"http://127.0.0.1:{port}")
    finally:
        process.kill()  # if this process is killed instead, the server sees its standard input close
        process.communicate()
