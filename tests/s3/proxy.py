"""A proxy in front of an S3 server that answers what a test tells it to, and remembers what it was asked.

    with fault_proxy(endpoint) as faults:
        faults.add(error(503, "SlowDown"), method="GET", path="/images/", times=2)

What becomes of a request is decided by an action, a function of the `Exchange`: those below, or a test's own.
"""

import http.client
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.s3.server import Endpoint


@dataclass(frozen=True)
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange(BaseHTTPRequestHandler):
    """A request, on a connection of its own, and the means of answering it."""

    protocol_version = "HTTP/1.1"
    server: "ProxyServer"

    def exchange(self) -> None:
        self.close_connection = True
        self.body = self.read_body()
        self.server.faults.action_for(self.command, self.path)(self)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = exchange

    def read_body(self) -> bytes:
        """The body as it was sent: one in chunks keeps their sizes, so that it fits its headers."""
        if "Transfer-Encoding" not in self.headers:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body, size = bytearray(), -1
        while size != 0:
            line = self.rfile.readline()
            size = int(line, 16)
            body += line + self.rfile.read(size + len(b"\r\n"))
        return bytes(body)

    def forward(self) -> Answer:
        """Ask the server. The headers stay as they are, Host too: the signature covers them."""
        upstream = http.client.HTTPConnection(self.server.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("connection", "expect"):
                upstream.putheader(name, value)
        upstream.endheaders(self.body)
        response = upstream.getresponse()
        body = response.read()
        headers = [(k, v) for k, v in response.getheaders() if k.lower() not in ("connection", "transfer-encoding")]
        if response.getheader("Transfer-Encoding"):
            headers.append(("Content-Length", str(len(body))))
        upstream.close()
        return Answer(response.status, headers, body)

    def answer(self, answer: Answer, sent: int | None = None) -> None:
        """Send an answer, or all its headers and the first `sent` bytes of its body."""
        self.send_response_only(answer.status)
        for name, value in (*answer.headers, ("Connection", "close")):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body[:sent])

    def log_message(self, *arguments: object) -> None:
        pass


Action = Callable[[Exchange], None]


def pass_on(exchange: Exchange) -> None:
    exchange.answer(exchange.forward())


def error(status: int, code: str) -> Action:
    """S3's own way of refusing: 503 SlowDown, 500 InternalError, 403 ExpiredToken. The server is not asked."""
    body = f"<Error><Code>{code}</Code><Message>by a test's order</Message></Error>".encode()
    headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))]
    return lambda exchange: exchange.answer(Answer(status, headers, b"" if exchange.command == "HEAD" else body))


def hold(exchange: Exchange) -> None:
    """No answer, until `faults.release()` ends the connection. The server is not asked."""
    exchange.server.faults.released.wait()
    reset(exchange)


def delay(seconds: float) -> Action:
    """The request reaches the server only after `seconds`."""

    def late(exchange: Exchange) -> None:
        released = exchange.server.faults.released.wait(seconds)
        (reset if released else pass_on)(exchange)

    return late


def reset(exchange: Exchange) -> None:
    """The connection breaks, which is not closed but reset, before the server has heard of the request."""
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(exchange.connection.detach())


def lose_answer(exchange: Exchange) -> None:
    """The server does what it was asked, but the connection breaks before it can say so."""
    exchange.forward()
    reset(exchange)


def reset_in_body(exchange: Exchange) -> None:
    """The connection breaks after half of the answer's body."""
    truncate(exchange)
    reset(exchange)


def truncate(exchange: Exchange) -> None:
    """The connection is closed properly, but after half of the answer's body, which must not be empty."""
    answer = exchange.forward()
    if not answer.body:
        raise ValueError(f"{exchange.command} {exchange.path} was answered without a body: there is nothing to cut")
    exchange.answer(answer, len(answer.body) // 2)


def flip_bit(exchange: Exchange) -> None:
    """A bit in the middle of the answer's body is wrong."""
    answer = exchange.forward()
    body = bytearray(answer.body)
    body[len(body) // 2] ^= 1
    exchange.answer(replace(answer, body=bytes(body)))


@dataclass
class Rule:
    action: Action
    method: str
    path: re.Pattern[str]
    first: int  # of the requests that match, counted from zero
    end: float
    seen: int = 0


class Faults:
    """The rules of a proxy, and the requests that came by: (method, path with query), as they were sent."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.requests: list[tuple[str, str]] = []
        self.released = threading.Event()
        self._rules: list[Rule] = []
        self._lock = threading.Lock()

    def add(self, action: Action, method: str = "", path: str = "", times: float = float("inf"),
            after: int = 0) -> None:
        """Let `action` decide about `times` requests, after the first `after`, of a method ("": any) and a path.

        `path` is searched, as a regular expression, in path and query: `/bucket/key?partNumber=1&uploadId=…`. Where
        several rules match, all count the request, and the oldest that is due has it.
        """
        with self._lock:
            self._rules.append(Rule(action, method, re.compile(path), after, after + times))

    def clear(self) -> None:
        """Forget rules and requests."""
        with self._lock:
            self._rules.clear()
            self.requests.clear()

    def release(self) -> None:
        """End the connections that are held or delayed, now and from now on."""
        self.released.set()

    def count(self, method: str = "", path: str = "") -> int:
        """How many requests matched, in the sense of `add`."""
        with self._lock:
            return sum(method in ("", m) and re.search(path, p) is not None for m, p in self.requests)

    def action_for(self, method: str, path: str) -> Action:
        with self._lock:
            self.requests.append((method, path))
            due = []
            for rule in self._rules:
                if rule.method in ("", method) and rule.path.search(path):
                    if rule.first <= rule.seen < rule.end:
                        due.append(rule.action)
                    rule.seen += 1
        return due[0] if due else pass_on


class ProxyServer(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, upstream: Endpoint) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.upstream = urlsplit(upstream.url).netloc
        self.faults = Faults(replace(upstream, url=f"http://127.0.0.1:{self.server_port}"))
        self.errors: list[BaseException] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, ConnectionError):
            self.errors.append(error)


@contextmanager
def fault_proxy(upstream: Endpoint) -> Iterator[Faults]:
    """Run a proxy on loopback. An exception in an action is raised at the end, but for connections that broke."""
    with ProxyServer(upstream) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.faults
        finally:
            server.faults.release()
            server.shutdown()
            thread.join()
    if server.errors:
        raise server.errors[0]
