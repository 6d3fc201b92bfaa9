"""For all tests: how they share processes, an S3 server, and a proxy that makes it fail.

The packages of the latter are imported when a test asks for them: most tests do not.
"""

import os
import secrets

import pytest
from xdist.scheduler import LoadScopeScheduling

from pipeline.session import ENVIRONMENT
from tests.s3.proxy import fault_proxy
from tests.s3.server import Bucket, s3_server

os.environ |= ENVIRONMENT  # before a test imports Ray
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each process has a core, not all of them


class ByModule(LoadScopeScheduling):
    """Which tests run in one process, one after another: those of a module, which share what is expensive, and all
    faults, which disturb one workspace."""

    def _split_scope(self, nodeid):
        module = nodeid.partition("::")[0]
        return "faults" if module.startswith("tests/faults/") else module


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # the folders with the longest tests come first, not the most tests
    return ByModule(config, log)


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
