"""Servers on this machine that judge, most of them badly. `with serve(answer) as server:` has `url` and `requests`."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

GOOD_LIMITS = {"timeout_seconds": 120.0, "step_timeout_seconds": 120.0}  # no good answer takes that long


class Server(NamedTuple):
    url: str
    requests: list  # the body of each request, in the order in which they came
    ending: threading.Event  # set at the end: what stalls then stops


@contextlib.contextmanager
def serve(answer):
    """answer(handler, body, server) writes the answer to a POST; a GET of /v1/models lists the model "made-up"."""
    ending = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            send(self, json.dumps({"data": [{"id": "made-up"}]} if self.path == "/v1/models" else {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(body)
            with contextlib.suppress(ConnectionError):
                answer(self, body, server)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        server = Server(f"http://127.0.0.1:{http.server_port}", [], ending)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            ending.set()
            http.shutdown()
            thread.join()


def send(handler, text: str, status: int = 200, length: int | None = None) -> None:
    data = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


def rewards(values):
    """Answers with these rewards, or with values(body)."""

    def answer(handler, body, server):
        send(handler, json.dumps({"rewards": values(body) if callable(values) else values}))

    return answer


def text(content: str, status: int = 200, length: int | None = None):
    return lambda handler, body, server: send(handler, content, status, length)


def stalls(handler, body, server):
    server.ending.wait()


def trickles(beginning: bytes):
    """Sends this at once, and then a space every hundredth of a second: each read succeeds, the answer never ends."""

    def answer(handler, body, server):
        handler.wfile.write(beginning)
        while not server.ending.wait(0.01):
            handler.wfile.write(b" ")
            handler.wfile.flush()

    return answer


def hangs_up(handler, body, server):
    handler.connection.close()


def chat(reply):
    """An OpenAI-compatible endpoint; reply(question) -> the text of the judge."""

    def answer(handler, body, server):
        (message,) = body["messages"]
        send(handler, json.dumps({"choices": [{"message": {"content": reply(message["content"])}}]}))

    return answer
