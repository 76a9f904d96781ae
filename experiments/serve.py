r"""A model behind OpenAI's protocol: completions, chats, their tokens and log-probs, and new weights without a restart.

    python experiments/serve.py --model DIR --port 8000
    curl localhost:8000/v1/completions -H "Content-Type: application/json" \
        -d '{"prompt": "Once upon a time", "max_tokens": 30, "logprobs": 1}'

docs/serving.md has the addresses and their fields. What a request gets depends on its prompt, its settings, its seed
and the seed of the server, not on who else asks: `rollouts.sampler.sample` gives the same tokens. Requests that wait
are sampled together, at most --rows completions at a time.

There is no password. All who reach the port may ask, and load weights from this machine's disk: keep it on
127.0.0.1, or behind something that asks for one. What a web page asks in a browser of this machine is refused.

Reached: not yet run as a service; tests/test_serve.py drives it with 64 clients.
"""

import contextlib
import dataclasses
import json
import queue
import select
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

from experiments.common import command_line, data, models
from experiments.common import openai_protocol as protocol
from experiments.common.engine import Answer, Engine, Stage
from experiments.common.openai_protocol import Call, Model, RequestProblem
from experiments.common.settings import MeshShape, Rare
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.train.log import log_info
from rljax.train.mesh import make_mesh

MAX_BODY_BYTES = 8 * 2**20
MAX_CONNECTIONS = 512  # each is a thread
SOCKET_SECONDS = 60.0  # for a client to send a line of its request, or its body, or take the next piece of its answer
LOOK_SECONDS = 0.25  # between two looks whether the client is still there


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model is served, and where."""

    model: str  # directory with config.json, *.safetensors and a tokenizer
    host: str = "127.0.0.1"  # address to listen at
    port: int = 8000  # 0: a free one, which is printed
    name: str = ""  # of the model, as clients ask for it; default: the name of its directory
    context: int = 0  # most tokens of a prompt and its completion; 0: the model's
    rows: int = 64  # most completions sampled at a time, and in one request
    seed: int = 0  # of sampling, together with that of a request
    max_waiting: Rare[int] = 1024  # requests that wait; further ones are refused
    dtype: Literal["float32", "bfloat16"] = "float32"  # of weights and computation
    mesh: MeshShape = MeshShape(fsdp=1, tensor=-1)


def main(cfg: Config) -> None:
    """Serve until interrupted."""
    with start(cfg) as server:
        log_info(f"{server.model.name} at http://{cfg.host}:{server.server_port}/v1")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@contextlib.contextmanager
def start(cfg: Config) -> Iterator["Server"]:
    """A server that listens, its model loaded; `serve_forever` answers."""
    config = hf.read_config(cfg.model)
    context = check_settings(cfg, config.max_positions)
    tokenizer = load_tokenizer(cfg.model, config.vocab_size)
    mesh = make_mesh(**cfg.mesh.sizes)
    config, params = models.load_model(cfg.model, mesh, cfg.dtype, context)

    def load(directory: Path):
        found = dataclasses.replace(hf.read_config(directory, context), dtype=config.dtype)
        if dataclasses.replace(found, hidden_sharding=config.hidden_sharding) != config:
            raise ValueError(f"{directory} has another architecture; legal: weights of the model that is served")
        return models.load_decoder(str(directory), config, mesh, cfg.dtype)

    pieces = data.token_bytes(tokenizer, config.vocab_size)
    lm = decoder.language_model(config)
    engine = Engine(lm, params, pieces, tokenizer.stop, cfg.rows, cfg.seed, load)
    del params  # the engine holds what it samples with
    name = cfg.name or Path(cfg.model).resolve().name
    model = Model(name, tokenizer, pieces, context, cfg.rows)
    try:
        with Server((cfg.host, cfg.port), engine, model, cfg.max_waiting) as server:
            yield server
    finally:
        engine.close()


def check_settings(cfg: Config, max_positions: int) -> int:
    """The context to serve: the given one, or the model's. Raises ValueError for settings that serve no request."""
    if not 0 <= cfg.context <= max_positions:
        raise ValueError(f"--context {cfg.context}; legal: at most the model's {max_positions}, or 0, which is that")
    if cfg.rows < 1 or cfg.max_waiting < 0:
        raise ValueError(f"--rows {cfg.rows}, --max_waiting {cfg.max_waiting}; legal: at least 1 row, and 0 waiting")
    return cfg.context or max_positions


class Server(ThreadingHTTPServer):
    """One thread a connection; the engine's thread samples for all."""

    daemon_threads = True
    request_queue_size = 256  # connections that the kernel holds until a thread takes them

    def __init__(self, address: tuple[str, int], engine: Engine, model: Model, max_waiting: int):
        super().__init__(address, Handler)
        self.engine = engine
        self.model = model
        self.max_waiting = max_waiting
        self.places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self.statuses: Counter[int] = Counter()
        self.lock = threading.Lock()

    def verify_request(self, request, client_address) -> bool:
        """Whether there is a thread for the connection; else it is closed."""
        return self.places.acquire(blocking=False)

    def process_request_thread(self, request, client_address) -> None:
        """One connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.places.release()

    def handle_error(self, request, client_address) -> None:
        """A connection that broke off is no error of the server's; anything else is printed."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def count(self, status: int) -> None:
        with self.lock:
            self.statuses[status] += 1


class Disconnected(Exception):
    """The client is gone."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = SOCKET_SECONDS
    server: Server

    def do_GET(self) -> None:
        self.respond(self.answer_get)

    def do_POST(self) -> None:
        self.respond(self.answer_post)

    def log_message(self, *_) -> None:
        """No line for each request; /metrics counts them."""

    def respond(self, answer) -> None:
        """Answer; what is wrong with the request is one JSON error, and a client that is gone gets nothing."""
        try:
            answer()
        except RequestProblem as problem:
            self.send_json(protocol.error_body(str(problem), problem.status, problem.field), problem.status)
        except (Disconnected, OSError):
            self.close_connection = True
        except Exception as error:
            traceback.print_exc()
            self.close_connection = True
            self.send_json(protocol.error_body(f"{type(error).__name__}: {error}", 500), 500)

    def answer_get(self) -> None:
        self.check_origin()
        model = self.server.model
        found = {"id": model.name, "object": "model", "owned_by": "rljax", "max_model_len": model.context}
        if self.path == "/v1/models":
            self.send_json({"object": "list", "data": [found]})
        elif unquote(self.path) == f"/v1/models/{model.name}":
            self.send_json(found)
        elif self.path == "/health":
            if not self.server.engine.thread.is_alive():
                raise RequestProblem("the engine has ended", 503)
            self.send_json({"status": "ok", "weight_version": self.server.engine.weights.version})
        elif self.path == "/metrics":
            self.send_bytes(metrics_text(self.server).encode(), "text/plain; version=0.0.4")
        else:
            raise RequestProblem(f"there is no {self.path}; docs/serving.md has the addresses", 404)

    def answer_post(self) -> None:
        self.check_origin()
        if self.path == "/update_weights_from_disk":
            self.update_weights(self.read_body())
        elif self.path in ("/v1/completions", "/v1/chat/completions"):
            call = protocol.read_call(self.read_body(), self.path == "/v1/chat/completions", self.server.model)
            self.complete(call)
        else:
            self.close_connection = True  # its body is not read
            raise RequestProblem(f"there is no {self.path}; docs/serving.md has the addresses", 404)

    def check_origin(self) -> None:
        """Raises RequestProblem for what a web page asks: a browser would send it, whatever page it shows."""
        if "Origin" in self.headers:
            self.close_connection = True  # its body is not read
            raise RequestProblem("a request of a web page (Origin); legal: clients that are no browsers", 403)

    def read_body(self) -> Any:
        """The JSON that was sent. Raises RequestProblem; what was not read ends the connection."""
        length = self.headers.get("Content-Length", "")
        kind = self.headers.get_content_type()
        is_known = length.isdecimal()
        is_small = is_known and len(length) < 20 and int(length) <= MAX_BODY_BYTES
        self.close_connection = self.close_connection or not is_small or kind != "application/json"
        if kind != "application/json":
            raise RequestProblem(f"a body of {kind}; legal: Content-Type: application/json", 415)
        if not is_known:
            raise RequestProblem("no Content-Length; legal: a body of a known length", 411)
        if not is_small:
            raise RequestProblem(f"a body of {length[:20]} bytes; legal: at most {MAX_BODY_BYTES}", 413)
        body = self.receive(int(length))
        try:
            content = json.loads(body)
            json.dumps(content, ensure_ascii=False).encode()  # no text has half of a surrogate pair
            return content
        except (ValueError, RecursionError) as error:
            raise RequestProblem(f"the body is no JSON: {error}") from None

    def receive(self, length: int) -> bytes:
        """So many bytes of the body. Raises RequestProblem where they take too long, Disconnected where fewer come."""
        deadline = time.monotonic() + SOCKET_SECONDS
        body = bytearray()
        try:
            while len(body) < length:
                piece = self.rfile.read1(length - len(body))
                if not piece:
                    raise Disconnected
                if time.monotonic() > deadline:
                    raise TimeoutError
                body += piece
        except TimeoutError:
            self.close_connection = True
            raise RequestProblem(f"the body did not come within {SOCKET_SECONDS:g} s", 408) from None
        return bytes(body)

    def update_weights(self, body: Any) -> None:
        """SGLang's address: {"model_path": directory, "weight_version": text}."""
        path = body.get("model_path") if isinstance(body, dict) else None
        version = body.get("weight_version") if isinstance(body, dict) else None
        version = "" if version is None else version
        if not isinstance(path, str) or not isinstance(version, str):
            raise RequestProblem('legal: {"model_path": a directory, "weight_version": a text}')
        try:
            self.server.engine.update_weights(Path(path), version)
        except (ValueError, OSError) as error:
            raise RequestProblem(f"the weights were not taken: {error}", field="model_path") from None
        self.send_json({"success": True, "message": f"weights of {path}, version {version!r}"})

    # ------------------------------------------------------------------------------------------------------ completions

    def complete(self, call: Call) -> None:
        engine = self.server.engine
        if engine.num_waiting + len(call.requests) > self.server.max_waiting:
            raise RequestProblem(f"{engine.num_waiting} requests wait; try again later", 429)
        engine.submit(*call.requests)
        try:
            if call.streams:
                self.stream(call)
            else:
                stages = [self.next_stage(request) for request in call.requests]
                answers = [stage.answers for stage in stages]
                self.send_json(protocol.whole_answer(call, answers, stages[-1].version, self.server.model))
        finally:
            for request in call.requests:
                request.is_abandoned.set()  # where the client has gone; else it is answered already

    def next_stage(self, request) -> Stage:
        """The next stage of a request. Raises Disconnected where the client leaves, RequestProblem for a bug."""
        while True:
            try:
                stage = request.stages.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                self.check_client()
                continue
            if stage.problem:
                raise RequestProblem(stage.problem, 500)
            return stage

    def check_client(self) -> None:
        """Raises Disconnected where the client has closed the connection."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and self.connection.recv(1, socket.MSG_PEEK) == b"":
            raise Disconnected

    def stream(self, call: Call) -> None:
        """Server-sent events: what each choice has gained, then [DONE]; or an error, which is the last event then."""
        self.send_response(200)
        self.server.count(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self.send_chunks(call)
        except (Disconnected, OSError):
            raise
        except Exception as error:  # the status is sent already
            message = str(error) if isinstance(error, RequestProblem) else f"{type(error).__name__}: {error}"
            self.send_event(json.dumps(protocol.error_body(message, 500)))

    def send_chunks(self, call: Call) -> None:
        model = self.server.model
        stages = []
        first = 0  # choice of the request
        for request in call.requests:
            shown = [Answer([], [], "", None)] * request.n
            while True:
                stage = self.next_stage(request)
                for g, answer in enumerate(stage.answers):
                    if len(answer.tokens) > len(shown[g].tokens) or answer.finish_reason != shown[g].finish_reason:
                        event = protocol.chunk(call, first + g, request, answer, shown[g], stage.version, model)
                        self.send_event(json.dumps(event, allow_nan=False))
                shown = stage.answers
                if stage.is_last:
                    break
            stages.append(stage)
            first += request.n
        if call.with_usage:
            answers = [stage.answers for stage in stages]
            self.send_event(json.dumps(protocol.usage_chunk(call, answers, stages[-1].version, model)))
        self.send_event("[DONE]")

    def send_event(self, text: str) -> None:
        self.wfile.write(f"data: {text}\n\n".encode())

    def send_json(self, content: Any, status: int = 200) -> None:
        self.send_bytes(json.dumps(content, allow_nan=False).encode(), "application/json", status)

    def send_bytes(self, content: bytes, kind: str, status: int = 200) -> None:
        self.server.count(status)
        try:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # no further answer may follow a part of this one
            self.close_connection = True


def metrics_text(server: Server) -> str:
    """What Prometheus reads."""
    engine = server.engine
    lines = ["# TYPE rljax_requests_total counter"]
    lines += [f'rljax_requests_total{{status="{status}"}} {count}' for status, count in sorted(server.statuses.items())]
    for name in ("batches", "tokens", "updates"):
        lines += [f"# TYPE rljax_{name}_total counter", f"rljax_{name}_total {engine.counts[name]}"]
    lines += ["# TYPE rljax_waiting gauge", f"rljax_waiting {engine.num_waiting}"]
    version = engine.weights.version.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    lines += ["# TYPE rljax_weights gauge", f'rljax_weights{{version="{version}"}} 1']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command_line.run(Config, main, one_process=True, makes_run=False)
