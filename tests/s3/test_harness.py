"""The S3 server and the proxy of the other tests do what they say."""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead
from pathlib import Path
from urllib.parse import urlsplit

import boto3
import botocore.exceptions
import pyarrow.fs
import pytest

from tests.s3.proxy import (
    delay,
    error,
    fault_proxy,
    flip_bit,
    hold,
    lose_answer,
    reset,
    reset_in_body,
    truncate,
)
from tests.s3.server import Endpoint, s3_server

ROOT = Path(__file__).parents[2]
BODY = bytes(range(256)) * 1024


@pytest.fixture
def client(faults):
    """A client that goes through the proxy and gives up at once."""
    return faults.endpoint.client()


@pytest.fixture
def stored(s3):
    """An object of 256 KiB."""
    s3.client().put_object(Bucket=s3.name, Key="stored", Body=BODY)
    return {"Bucket": s3.name, "Key": "stored"}


def code(failure):
    return failure.value.response["Error"]["Code"]


def keys(s3):
    return [o["Key"] for o in s3.client().list_objects_v2(Bucket=s3.name).get("Contents", [])]


def address(endpoint):
    parts = urlsplit(endpoint.url)
    return parts.hostname, parts.port


def test_objects_survive_the_round_trip_through_the_proxy(s3, faults):
    client = boto3.client("s3")  # found by the environment
    client.put_object(Bucket=s3.name, Key="a b/ü.bin", Body=BODY, Metadata={"sha256": "00"})
    answer = client.get_object(Bucket=s3.name, Key="a b/ü.bin")
    assert answer["Body"].read() == BODY and answer["Metadata"] == {"sha256": "00"}
    assert answer["ETag"].strip('"') == hashlib.md5(BODY).hexdigest()
    assert client.get_object(Bucket=s3.name, Key="a b/ü.bin", Range="bytes=3-5")["Body"].read() == BODY[3:6]
    client.copy_object(Bucket=s3.name, Key="copy", CopySource={"Bucket": s3.name, "Key": "a b/ü.bin"})
    assert client.head_object(Bucket=s3.name, Key="copy")["ContentLength"] == len(BODY)
    assert faults.count("PUT", f"/{s3.name}/a%20b/") == 1
    assert faults.count(path="/copy") == 2 and faults.count("HEAD", "/copy$") == 1


def test_parts_become_one_object(s3, client):
    name = {"Bucket": s3.name, "Key": "parts"}
    parts = [os.urandom(5 << 20), b"the rest"]
    upload = {**name, "UploadId": client.create_multipart_upload(**name)["UploadId"]}
    tags = [{"PartNumber": n, "ETag": client.upload_part(**upload, PartNumber=n, Body=part)["ETag"]}
            for n, part in enumerate(parts, 1)]
    assert keys(s3) == []
    client.complete_multipart_upload(**upload, MultipartUpload={"Parts": tags})
    assert client.get_object(**name)["Body"].read() == b"".join(parts)


def test_an_object_is_created_once(s3, client):
    name = {"Bucket": s3.name, "Key": "lease"}
    client.put_object(**name, Body=b"mine", IfNoneMatch="*")
    with pytest.raises(botocore.exceptions.ClientError) as failure:
        client.put_object(**name, Body=b"yours", IfNoneMatch="*")
    assert code(failure) == "PreconditionFailed"
    assert client.get_object(**name)["Body"].read() == b"mine"


def test_of_many_who_create_an_object_at_once_one_does(s3, client):
    def created(key):
        try:
            client.put_object(Bucket=s3.name, Key=key, Body=b"", IfNoneMatch="*")
            return True
        except botocore.exceptions.ClientError as failure:
            assert failure.response["Error"]["Code"] == "PreconditionFailed"
            return False

    attempts = list("abc" * 8)
    with ThreadPoolExecutor(8) as pool:
        winners = [key for key, won in zip(attempts, pool.map(created, attempts), strict=True) if won]
    assert sorted(winners) == ["a", "b", "c"]


def test_pyarrow_uploads_in_chunks_through_the_proxy(s3, faults):
    files, bucket = pyarrow.fs.FileSystem.from_uri(s3.url)  # its S3FileSystem() does not look at the environment
    with files.open_output_stream(f"{bucket}/streamed") as stream:
        stream.write(BODY)
    with files.open_input_file(f"{bucket}/streamed") as file:
        assert file.read_at(100, 5000) == BODY[5000:5100]
    assert faults.count("GET", "/streamed") == 1 and keys(s3) == ["streamed"]


def test_listing_goes_page_by_page_and_deletion_by_the_batch(s3, client):
    names = [f"{folder}/{i}" for folder in "ab" for i in range(3)]
    for name in names:
        client.put_object(Bucket=s3.name, Key=name, Body=b"")
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=s3.name, PaginationConfig={"PageSize": 4})
    assert [[o["Key"] for o in page["Contents"]] for page in pages] == [names[:4], names[4:]]
    folders = client.list_objects_v2(Bucket=s3.name, Delimiter="/")["CommonPrefixes"]
    assert [f["Prefix"] for f in folders] == ["a/", "b/"]
    client.delete_objects(Bucket=s3.name, Delete={"Objects": [{"Key": name} for name in names[1:]]})
    assert keys(s3) == names[:1]


def test_wrong_signatures_are_refused(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(botocore.exceptions.ClientError) as failure:
        boto3.client("s3").list_objects_v2(Bucket=s3.name)
    assert code(failure) == "SignatureDoesNotMatch"


@pytest.mark.parametrize(("status", "name"), [(503, "SlowDown"), (500, "InternalError"), (403, "ExpiredToken"),
                                              (403, "InvalidAccessKeyId"), (403, "RequestTimeTooSkewed")])
def test_errors_look_like_those_of_s3(faults, client, stored, status, name):
    faults.add(error(status, name), "GET")
    with pytest.raises(botocore.exceptions.ClientError) as failure:
        client.get_object(**stored)
    assert code(failure) == name
    assert failure.value.response["ResponseMetadata"]["HTTPStatusCode"] == status
    client.head_object(**stored)
    faults.add(error(status, name), "HEAD")
    with pytest.raises(botocore.exceptions.ClientError, match=str(status)):
        client.head_object(**stored)


def test_a_rule_waits_for_its_turn_and_ends(faults, client, stored):
    faults.add(error(500, "InternalError"), "GET", "/stored$", times=2, after=1)
    faults.add(error(503, "SlowDown"), "GET", "/stored$", times=3, after=1)
    seen = []
    for _ in range(5):
        try:
            client.get_object(**stored)
            seen.append(None)
        except botocore.exceptions.ClientError as failure:
            seen.append(failure.response["Error"]["Code"])
        client.list_objects_v2(Bucket=stored["Bucket"])  # another path
    assert seen == [None, "InternalError", "InternalError", "SlowDown", None]
    assert faults.count("GET", "/stored$") == 5
    faults.clear()
    assert faults.count() == 0


@pytest.mark.parametrize("action", [hold, delay(1000)], ids=["hold", "delay"])
def test_no_answer_until_it_is_released(s3, faults, client, action):
    arrived = threading.Event()

    def arrive(exchange):
        arrived.set()
        action(exchange)

    faults.add(arrive, "PUT")
    with ThreadPoolExecutor(1) as pool:
        put = pool.submit(client.put_object, Bucket=s3.name, Key="key", Body=b"x")
        assert arrived.wait(10)
        faults.release()
        with pytest.raises(botocore.exceptions.ConnectionClosedError):
            put.result()
    assert keys(s3) == []


def test_clients_lose_patience(faults, stored):
    faults.add(hold, "GET")
    with pytest.raises(botocore.exceptions.ReadTimeoutError):
        faults.endpoint.client(read_timeout=0.1).get_object(**stored)


def test_delayed_requests_arrive(faults, client, stored):
    faults.add(delay(0.01), "GET")
    assert client.get_object(**stored)["Body"].read() == BODY


@pytest.mark.parametrize(("action", "done"), [(reset, False), (lose_answer, True)], ids=["before", "after"])
def test_connections_break_before_or_after_the_work(s3, faults, client, action, done):
    faults.add(action, "PUT")
    with pytest.raises(botocore.exceptions.ConnectionClosedError, match="Connection was closed"):
        client.put_object(Bucket=s3.name, Key="key", Body=b"x")
    assert keys(s3) == ["key"] * done


@pytest.mark.parametrize(("action", "cause"), [(reset_in_body, ConnectionResetError), (truncate, IncompleteRead)])
def test_bodies_end_early(faults, client, stored, action, cause):
    faults.add(action, "GET")
    body = client.get_object(**stored)["Body"]
    with pytest.raises(botocore.exceptions.ResponseStreamingError) as failure:
        body.read()
    assert isinstance(failure.value.kwargs["error"].args[1], cause)


def test_a_wrong_bit_goes_unnoticed(faults, client, stored):
    faults.add(flip_bit, "GET")
    body = client.get_object(**stored)["Body"].read()
    assert [i for i, (a, b) in enumerate(zip(body, BODY, strict=True)) if a != b] == [len(BODY) // 2]


def test_faults_that_do_not_happen_come_to_light(s3, stored):
    with pytest.raises(ValueError, match="HEAD .*/stored was answered without a body"):  # noqa: SIM117
        with fault_proxy(s3.endpoint) as faults:
            faults.add(truncate, "HEAD")
            with pytest.raises(botocore.exceptions.ConnectionClosedError):
                faults.endpoint.client().head_object(**stored)


def test_the_server_ends_with_its_block_or_its_process_and_keeps_the_data(tmp_path):
    code = ("import pathlib, signal, sys\nfrom tests.s3.server import s3_server\n"
            "with s3_server(pathlib.Path(sys.argv[1])) as endpoint:\n    print(endpoint.url, flush=True)\n"
            "    signal.pause()")
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE) as process:
        endpoint = Endpoint(process.stdout.readline().decode().strip())
        endpoint.client().create_bucket(Bucket="bucket")
        endpoint.client().put_object(Bucket="bucket", Key="key", Body=b"kept")
        with socket.create_connection(address(endpoint), timeout=30) as connection:
            process.kill()
            assert connection.recv(1) == b"", "the connection ends with the server"
    with s3_server(tmp_path) as endpoint:
        assert endpoint.client().get_object(Bucket="bucket", Key="key")["Body"].read() == b"kept"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address(endpoint))


def test_a_server_that_cannot_start_says_why(tmp_path):
    (tmp_path / "object.ring.gz").mkdir()
    with pytest.raises(RuntimeError, match=r"(?s)did not start:.*object\.ring\.gz"), s3_server(tmp_path):
        pass


def test_a_file_system_without_extended_attributes_is_named():
    with pytest.raises(RuntimeError, match="/proc cannot hold the S3 server's data"), s3_server(Path("/proc")):
        pass
