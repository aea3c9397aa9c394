"""A real HTTP server that speaks OpenAI's protocol, with faults by order, in a process or a thread of its own.

Its reply to a conversation is a pure function of what was asked, `reply_to`; every answer that it gave whole, and every
prompt that it was asked, is counted. Faults come by the number of the request: `faults[n % len(faults)]`, or None.
"""

import json
import threading
import time
from collections import Counter
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "500", "503", "cut", "reset", "slow", "no json", "no choices", "html", "ids", "empty body")


def digest(messages: list[dict]) -> str:
    return blake2b(json.dumps(messages, sort_keys=True).encode(), digest_size=6).hexdigest()


def reply_to(messages: list[dict]) -> str:
    """What the server says to a conversation: some words that depend on all of it."""
    said = [(message["role"], message["content"]) for message in messages]
    return "reply " + blake2b(json.dumps(said).encode(), digest_size=8 + len(said)).hexdigest()


class ChatServer(ThreadingHTTPServer):
    """Listens on a free port of this machine. encode: messages to prompt ids, None for a server that returns none."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, faults=(None,), encode=None, key=None, owner="vllm", answer=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.encode, self.key, self.owner, self.answer = faults, encode, key, owner, answer
        self.lock = threading.Lock()
        self.asked, self.answered, self.faulted = Counter(), Counter(), Counter()
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.times: list[float] = []
        self.open = self.most_open = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request, client_address):
        """Say nothing: clients are killed here."""

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._send(200, {"data": [{"id": "tiny", "object": "model", "owned_by": self.server.owner}]})

    def do_POST(self):
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            number = len(server.requests)
            server.requests.append(request)
            server.headers.append(dict(self.headers))
            server.times.append(time.monotonic())
            server.asked[digest(request["messages"])] += 1
            server.open += 1
            server.most_open = max(server.most_open, server.open)
        try:
            self._answer(request, server.faults[number % len(server.faults)])
        finally:
            with server.lock:
                server.open -= 1

    def _answer(self, request: dict, fault: str | None) -> None:
        server = self.server
        if server.key and self.headers.get("authorization") != f"Bearer {server.key}":
            return self._send(401, {"error": {"message": f"wrong key: {self.headers.get('authorization')}"}})
        with server.lock:
            server.faulted[fault] += fault is not None
        if fault == "429":
            return self._send(429, {"error": {"message": "slower"}}, {"Retry-After": "0.05"})
        if fault and fault.startswith("\x1b"):
            return self._send(400, {"error": {"message": f"{fault}red"}})
        if fault and fault.isdigit():
            return self._send(int(fault), {"error": {"message": "the server's own fault"}})
        if fault == "reset":
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(1.0)  # nobody waits for it any more
            self.close_connection = True
            return None
        if fault == "no json":
            return self._raw(b'{"choices": [{"mess')
        if fault == "empty body":
            return self._raw(b"")
        if fault == "html":
            return self._raw(b"<html>a proxy's own page</html>")
        if fault == "no choices":
            return self._send(200, {"choices": []})
        body = self._body(request)
        if fault == "ids":
            body["choices"][0]["token_ids"] = ["no", "ids"]
        if fault == "cut":
            return self._cut(json.dumps(body).encode())
        self._send(200, body)
        with server.lock:
            server.answered[digest(request["messages"])] += fault is None
        return None

    def _body(self, request: dict) -> dict:
        server = self.server
        choice = {"index": 0, "message": {"role": "assistant", "content": reply_to(request["messages"])}}
        choice["finish_reason"] = "stop"
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "tiny", "choices": [choice]}
        body["usage"] = {"completion_tokens": 7}
        if server.answer:
            choice.update(server.answer(request))
        if server.encode and request.get("return_token_ids"):
            prompt, reply = server.encode(request["messages"], choice["message"]["content"] or "")
            choice["token_ids"] = reply
            (choice if server.owner == "sglang" else body)["prompt_token_ids"] = prompt
        return body

    def _send(self, status: int, body: dict, headers: dict | None = None) -> None:
        self._raw(json.dumps(body).encode(), status, headers)

    def _raw(self, data: bytes, status: int = 200, headers: dict | None = None) -> None:
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}
        for name, value in sent.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def _cut(self, data: bytes) -> None:
        """Promise the whole answer, send half of it and hang up."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True
