"""Fixtures for all tests: an S3 server, and a proxy that makes it fail.

Their packages are imported when a test asks for them: most tests do not.
"""

import os
import secrets

import pytest

from tests.s3.proxy import fault_proxy
from tests.s3.server import Bucket, s3_server


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory):
    """One server for all tests that want one."""
    with s3_server(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint, monkeypatch):
    """A `Bucket` for this test alone; every S3 client in it and in its child processes talks to the test server."""
    import boto3

    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in s3_endpoint.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)  # it remembers who used it first
    bucket = Bucket(s3_endpoint, f"test-{secrets.token_hex(6)}")
    bucket.client().create_bucket(Bucket=bucket.name)
    return bucket


@pytest.fixture
def faults(s3, monkeypatch):
    """The `Faults` of a proxy through which every S3 client of this test now goes, but for `s3.client()`."""
    with fault_proxy(s3.endpoint) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.endpoint.url)
        yield faults
