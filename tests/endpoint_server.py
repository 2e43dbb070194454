"""An OpenAI-compatible server of the tests, on a real socket, that misbehaves as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What to answer. `drop`: close the connection instead; `length`: the Content-Length, whatever the body has."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    drop: bool = False
    length: int | None = None


@dataclass
class Seen:
    """A request as it came."""

    body: dict[str, Any]
    headers: dict[str, str]
    at: float
    path: str

    @property
    def text(self) -> str:
        """The text of the last message."""
        content = self.body["messages"][-1]["content"]
        return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def completion(text: str | None, finish: str | None = "stop", **more: Any) -> dict[str, Any]:
    """A chat completion. `logprobs`: (token, log-probability) pairs; `tokens`: usage.completion_tokens."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    if "logprobs" in more:
        choice["logprobs"] = {"content": [{"token": t, "logprob": p} for t, p in more["logprobs"]]}
    found: dict[str, Any] = {"object": "chat.completion", "choices": [choice]}
    if "tokens" in more:
        found["usage"] = {"completion_tokens": more["tokens"]}
    return found


def echo(seen: Seen) -> Reply:
    """The answer tells the question."""
    return Reply(completion(f"re: {seen.text}", tokens=3))


class EndpointServer:
    """Answers chat completions by `answer(request) -> Reply`, and GET /v1/models by `models`."""

    def __init__(self, answer: Callable[[Seen], Reply] = echo, port: int = 0) -> None:
        self.answer = answer
        self.models = Reply({"object": "list", "data": [{"id": "tiny"}]})
        self.seen: list[Seen] = []
        self.in_flight = self.most_in_flight = 0
        self.connections: list[socket.socket] = []
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self.port = int(self._http.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """As a server that is killed: connections break."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def reply(self, seen: Seen) -> Reply:
        with self._lock:
            self.seen.append(seen)
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            found = self.answer(seen)
            time.sleep(found.delay)
            return found
        finally:
            with self._lock:
                self.in_flight -= 1


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are none of ours."""


def _handler(server: EndpointServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            server.connections.append(self.request)
            super().setup()

        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self._send(server.models)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen = Seen(body, {k.lower(): v for k, v in self.headers.items()}, time.monotonic(), self.path)
            self._send(server.reply(seen))

        def _send(self, reply: Reply) -> None:
            if reply.drop:
                self.close_connection = True
                return
            body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            headers = {"Content-Type": "application/json", **reply.headers}
            self.send_response(reply.status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) if reply.length is None else reply.length))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = reply.length is not None

    return Handler


@contextmanager
def serving(answer: Callable[[Seen], Reply] = echo, port: int = 0) -> Iterator[EndpointServer]:
    server = EndpointServer(answer, port)
    try:
        yield server
    finally:
        server.close()
