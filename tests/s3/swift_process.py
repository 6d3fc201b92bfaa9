"""OpenStack Swift behind its S3 interface, in one process: run by `server.py`, never imported.

`swift_process.py DIRECTORY ACCESS_KEY SECRET_KEY` prints the port on which it answers, and stops when its standard
input is closed. Swift's four servers, usually daemons of several machines, are green threads that talk over loopback:
one device, one copy, one partition.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import eventlet.wsgi
from eventlet.semaphore import Semaphore
from swift.common import constraints, db, http_protocol, utils, wsgi
from swift.common.concurrency import trampoline
from swift.common.ring.ring import RingData
from swift.common.utils import logs

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

DEVICE = "device"
STORAGE = ("account", "container", "object")

# A busy machine is slow, not broken: no timeout inside the server ends before those of its clients.
COMMON = """
[DEFAULT]
swift_dir = {directory}
devices = {directory}
mount_check = false
fallocate_reserve = 0
log_level = WARNING
conn_timeout = 600
node_timeout = 600
container_update_timeout = 600
"""
STORAGE_SERVER = COMMON + """
[app:main]
use = egg:swift#{kind}
"""
PROXY_SERVER = COMMON + """
[pipeline:main]
pipeline = s3api tempauth slo proxy-server
[filter:s3api]
use = egg:swift#s3api
[filter:tempauth]
use = egg:swift#tempauth
user_{user} = {secret_key} .admin
[filter:slo]
use = egg:swift#slo
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
"""


class StandardError(logging.StreamHandler):
    """Swift knows no log but syslog."""

    def __init__(self, **syslog: object) -> None:
        super().__init__(sys.stderr)

    def createLock(self) -> None:  # the usual lock does not work between green and real threads
        self.lock = logs.PipeMutex()


def unsynchronised(connect: Callable[..., Connection], *arguments: Any, **options: Any) -> Connection:
    """SQLite that does not wait for the disk: writing an object takes half the time."""
    connection = connect(*arguments, **options)
    connection.execute("PRAGMA synchronous = OFF")
    return connection


def in_turn(app: Application) -> Application:
    """Conditional writes one after another: of those that come at once S3 lets one through, Swift several."""
    turn = Semaphore()

    def serve_request(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] in ("PUT", "POST") and "HTTP_IF_NONE_MATCH" in environ:
            with turn:
                return list(app(environ, start_response))
        return app(environ, start_response)

    return serve_request


def serve(directory: Path, access_key: str, secret_key: str) -> None:
    utils.monkey_patch()
    eventlet.hubs.use_hub(wsgi.get_hub())
    logs.ThreadSafeSysLogHandler = StandardError
    utils.HASH_PATH_SUFFIX = b"tests"
    db.get_db_connection = partial(unsynchronised, db.get_db_connection)
    os.fsync = os.fdatasync = lambda descriptor: None  # nothing here outlives the machine

    sockets = {kind: eventlet.listen(("127.0.0.1", 0)) for kind in (*STORAGE, "proxy")}
    ports = {kind: socket.getsockname()[1] for kind, socket in sockets.items()}
    (directory / DEVICE).mkdir(exist_ok=True)
    for kind in STORAGE:
        device = {"id": 0, "device": DEVICE, "ip": "127.0.0.1", "port": ports[kind], "region": 1, "zone": 1,
                  "weight": 1.0, "meta": ""}
        RingData([[0]], [device], part_shift=32).save(directory / f"{kind}.ring.gz")

    for kind, socket in sockets.items():
        text = (PROXY_SERVER if kind == "proxy" else STORAGE_SERVER).format(
            directory=directory, kind=kind, user=access_key.replace(":", "_"), secret_key=secret_key)
        app = in_turn(wsgi.loadapp(wsgi.ConfigString(text), global_conf={"log_name": kind}))
        eventlet.spawn(eventlet.wsgi.server, socket, app, logs.NullLogger(), protocol=http_protocol.SwiftHttpProtocol,
                       capitalize_response_headers=False, url_length_limit=constraints.MAX_REQUEST_LINE)
    print(ports["proxy"], flush=True)
    trampoline(sys.stdin, read=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), *sys.argv[2:])
