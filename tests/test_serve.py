"""serve.py: the public client gets what the sampler samples, whoever else asks; garbage gets one clear error."""

import concurrent.futures
import contextlib
import http.client
import json
import select
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import openai
import pytest

from experiments import serve
from experiments.common import engine as engines
from experiments.common.engine import Answer, Engine, Request, Weights, _End, _Update
from experiments.tools import tiny_model
from rljax.data.prompts import pad_left
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.rollouts.sampler import prepare_once, sample
from rljax.types import PromptBatch, Sampling

SEED = 3
WAIT = 300.0  # seconds; nothing here takes long, but a machine may be busy
PROMPTS = [[5, 6, 7], [40], [70, 71, 72, 73, 74, 75], [9, 9]]


@pytest.fixture(scope="module")
def directories(tmp_path_factory) -> dict[str, Path]:
    """Three models: the one that is served, other weights of it, and another architecture."""
    root = tmp_path_factory.mktemp("served")
    sizes = {"tiny": (32, 0), "other": (32, 1), "wider": (64, 0)}
    for name, (width, seed) in sizes.items():
        tiny_model.main(tiny_model.Config(str(root / name), width=width, layers=1, context=128, seed=seed))
    return {name: root / name for name in sizes}


@pytest.fixture(scope="module")
def server(directories):
    with serving(directories["tiny"]) as server:
        yield server


@contextlib.contextmanager
def serving(directory: Path, **settings):
    with serve.start(serve.Config(str(directory), port=0, seed=SEED, rows=4, **settings)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def client_of(server, **settings):
    url = f"http://127.0.0.1:{server.server_port}/v1"
    with openai.OpenAI(base_url=url, api_key="none", **{"max_retries": 0, "timeout": WAIT} | settings) as client:
        yield client


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as client:
        yield client


def in_process(directory: Path, prompts: list[list[int]], step: int, numbers: list[int], **settings):
    """(ids, log-probs, ended) of each completion, sampled all at once by `sample`."""
    config = hf.read_config(directory)
    tokens, mask = pad_left(prompts, max(map(len, prompts)), 0)
    rows = PromptBatch(tokens, mask, np.array(numbers, np.int32), [{} for _ in prompts], 0)
    sampling = Sampling(stop=load_tokenizer(directory).stop, logp="policy", **settings)
    params = {"decoder": hf.load(directory, config)}
    traj = jax.device_get(sample(decoder.language_model(config), params, {}, rows, sampling, SEED, step))
    chosen = [traj.mask[row] for row in range(len(traj.mask))]
    return [
        (traj.actions[row][mask].tolist(), traj.logp[row][mask], bool(traj.terminated[row].any()))
        for row, mask in enumerate(chosen)
    ]


def check(choices, expected) -> None:
    assert len(choices) == len(expected)
    for choice, (ids, logp, ended) in zip(choices, expected, strict=True):
        assert choice.token_ids == ids
        np.testing.assert_allclose(choice.logprobs.token_logprobs, logp, atol=1e-5)
        assert choice.finish_reason == ("stop" if ended else "length")


IDS = {"return_token_ids": True}
POST = b"POST /v1/completions HTTP/1.1\r\nContent-Type: application/json\r\n"


# --------------------------------------------------------------------------------------------------- what is sampled


def test_ids_and_logprobs_are_those_of_sample(client, directories):
    expected = in_process(directories["tiny"], PROMPTS, 7, [0, 1, 2, 3], n=3, max_tokens=16)
    found = client.completions.create(
        model="tiny", prompt=PROMPTS, n=3, max_tokens=16, logprobs=1, seed=7, extra_body=IDS
    )
    check(found.choices, expected)
    assert [choice.index for choice in found.choices] == list(range(12))
    assert found.choices[4].prompt_token_ids == PROMPTS[1]
    tokens = sum(len(ids) for ids, _, _ in expected)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (sum(map(len, PROMPTS)), tokens)
    decode = load_tokenizer(directories["tiny"]).decode
    assert [choice.text for choice in found.choices] == [decode(ids) for ids, _, _ in expected]
    for choice in found.choices:  # each token of the text is where its offset says
        marks = choice.logprobs
        places = zip(marks.tokens, marks.text_offset, strict=True)
        ascii_places = [(token, start) for token, start in places if token.isascii() and start < len(choice.text)]
        assert [choice.text[start : start + len(token)] for token, start in ascii_places] == [
            t for t, _ in ascii_places
        ]
        assert marks.text_offset == sorted(marks.text_offset)


def test_a_key_is_that_of_a_training_run(client, directories):
    numbers = [104, 230, 7, 0]
    expected = in_process(directories["tiny"], PROMPTS, 11, numbers, n=3, max_tokens=16)
    for place, number in enumerate(numbers):
        extra = {**IDS, "key": [11, number]}
        found = client.completions.create(
            model="tiny", prompt=PROMPTS[place], n=3, max_tokens=16, logprobs=0, extra_body=extra
        )
        check(found.choices, expected[3 * place : 3 * place + 3])


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.5, "top_p": 0.8, "top_k": 50},
        pytest.param({"temperature": 0.0}, marks=pytest.mark.nightly),
    ],
)
def test_settings_of_sampling(client, directories, settings):
    expected = in_process(directories["tiny"], PROMPTS[:1], 2, [0], max_tokens=16, **settings)
    found = client.completions.create(
        model="tiny", prompt=PROMPTS[0], max_tokens=16, logprobs=1, seed=2, extra_body=IDS | settings
    )
    check(found.choices, expected)


def test_where_a_completion_stops(client):
    def ask(**settings):
        extra = IDS | settings.pop("extra", {})
        (choice,) = client.completions.create(
            **{"model": "tiny", "prompt": [70, 71], "max_tokens": 32, "seed": 4} | settings, extra_body=extra
        ).choices
        return choice

    whole = ask()
    ids, text = whole.token_ids, whole.text
    middle = next(c for c in text[3:] if c.isascii())
    stopped = ask(stop=[middle, "never there"])
    assert stopped.finish_reason == "stop"
    assert stopped.text == text[: text.index(middle)]
    assert stopped.token_ids == ids[: len(stopped.token_ids)]
    cut = ask(extra={"stop_token_ids": [ids[9]]})
    assert cut.token_ids == ids[: ids.index(ids[9]) + 1]
    assert cut.finish_reason == "stop"
    assert cut.text == ask(max_tokens=len(cut.token_ids) - 1).text  # without the token that stopped it


def test_a_stream_is_the_answer_in_pieces(client):
    settings = {"model": "tiny", "prompt": PROMPTS[:2], "n": 2, "max_tokens": 32, "seed": 5, "logprobs": 1}
    whole = client.completions.create(**settings, extra_body=IDS)
    pieces = {index: ["", [], [], [], None] for index in range(4)}
    count = 0
    for event in client.completions.create(
        **settings, extra_body=IDS, stream=True, stream_options={"include_usage": True}
    ):
        usage = event.usage
        for choice in event.choices:
            count += 1
            found = pieces[choice.index]
            found[0] += choice.text
            found[1] += choice.token_ids
            found[2] += choice.logprobs.token_logprobs
            found[3] += choice.logprobs.text_offset
            found[4] = choice.finish_reason
    assert count > 8
    assert usage == whole.usage
    for choice in whole.choices:
        marks = choice.logprobs
        expected = [choice.text, choice.token_ids, marks.token_logprobs, marks.text_offset, choice.finish_reason]
        assert pieces[choice.index] == expected


def test_a_chat_is_the_completion_of_its_template(client, directories):
    messages = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Who?"}]
    settings = {"model": "tiny", "messages": messages, "seed": 6, "logprobs": True, "max_completion_tokens": 16}
    (choice,) = client.chat.completions.create(**settings, extra_body=IDS).choices
    text = "<|im_start|>system\nShort.<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer = load_tokenizer(directories["tiny"])
    prompt = tokenizer.encode_more(text)
    (same,) = client.completions.create(
        model="tiny", prompt=prompt, seed=6, max_tokens=16, logprobs=1, extra_body=IDS
    ).choices
    assert choice.token_ids == same.token_ids
    assert choice.message.content == same.text
    assert [token.logprob for token in choice.logprobs.content] == same.logprobs.token_logprobs
    joined = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert joined.decode(errors="replace").startswith(choice.message.content)
    assert any(not token.token.isascii() and len(token.bytes) == 1 for token in choice.logprobs.content)
    parts = [messages[0], {"role": "user", "content": [{"type": "text", "text": t} for t in ("Wh", "o?")]}]
    (in_parts,) = client.chat.completions.create(**settings | {"messages": parts}, extra_body=IDS).choices
    assert in_parts.token_ids == choice.token_ids
    streamed = client.chat.completions.create(**settings, stream=True)
    assert "".join(event.choices[0].delta.content for event in streamed) == choice.message.content


# ------------------------------------------------------------------------------------------------------------- garbage


def post(server, body: bytes | str | dict, path: str = "/v1/completions", headers: dict | None = None):
    """Status and JSON of one request as bytes."""
    data = json.dumps(body) if isinstance(body, dict) else body
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT)
    try:
        connection.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


LONG = {"prompt": [1] * 128}
GARBAGE = [
    (b"\xff\xfe", 400, "the body is no JSON"),
    ("{", 400, "the body is no JSON"),
    ("[" * 100_000, 400, "the body is no JSON"),
    ("[1]", 400, "the body is no JSON object"),
    ({}, 400, "prompt = None; legal: a text"),
    ({"prompt": ""}, 400, "prompt = \\[\\]; legal"),
    ({"prompt": []}, 400, "prompt = \\[\\]; legal"),
    ({"prompt": [259]}, 400, "ids below 259"),
    ({"prompt": [-1]}, 400, "ids below 259"),
    ({"prompt": [True]}, 400, "legal"),
    ({"prompt": {"a": 1}}, 400, "legal"),
    ({"prompt": [[1], "a", [2, "b"]]}, 400, "legal"),
    ({"prompt": [[1]] * 17}, 400, "17 prompts; legal: at most 4"),
    (LONG, 400, "a prompt of 128 tokens; legal: fewer than the 128"),
    ({"prompt": [1], "max_tokens": -1}, 400, "max_tokens = -1; legal: a whole number from 1 to 127"),
    ({"prompt": [1], "max_tokens": 128}, 400, "max_tokens = 128; legal: a whole number from 1 to 127"),
    ({"prompt": [1], "max_tokens": "4"}, 400, "max_tokens = '4'; legal"),
    ({"prompt": [1], "max_tokens": True}, 400, "max_tokens = True; legal"),
    ('{"prompt": [1], "temperature": NaN}', 400, "temperature = nan; legal"),
    ({"prompt": [1], "temperature": -0.5}, 400, "temperature = -0.5; legal"),
    ({"prompt": [1], "temperature": 1e-10}, 400, "temperature = 1e-10; legal: 0, which is greedy, or a number from"),
    ({"prompt": [1], "top_p": 0}, 400, "top_p = 0; legal"),
    ({"prompt": [1], "n": 17}, 400, "n = 17; legal: a whole number from 1 to 4"),
    ({"prompt": [1], "seed": 2**63}, 400, "seed = 9223372036854775808; legal"),
    ({"prompt": [1], "key": [1]}, 400, "key = \\[1\\]; legal: \\[step, number\\]"),
    ({"prompt": [1], "stop": [""]}, 400, "stop = \\[''\\]; legal"),
    ({"prompt": "\ud800"}, 400, "the body is no JSON: .*surrogates not allowed"),
    ({"prompt": [1], "stop": ["\ud800"]}, 400, "surrogates not allowed"),
    ({"prompt": [1], "stream_options": 7}, 400, "stream_options = 7; legal"),
    ({"prompt": [1], "stop": 3}, 400, "stop = 3; legal"),
    ({"prompt": [1], "stop_token_ids": [1000]}, 400, "stop_token_ids"),
    ({"prompt": [1], "stream": "yes"}, 400, "stream = 'yes'; legal: true or false"),
    ({"prompt": [1], "logprobs": 5}, 400, "logprobs = 5; legal: a whole number from 0 to 1"),
    ({"prompt": [1], "presence_penalty": 1}, 400, "presence_penalty is not supported"),
    ({"prompt": [1], "min_p": 0.1}, 400, "min_p is not supported"),
    ({"prompt": [1], "tools": []}, 400, "tools is not supported"),
    ({"prompt": [1], "model": "gpt-5"}, 404, "there is no model 'gpt-5'; this server has tiny"),
]


@pytest.mark.parametrize(("body", "status", "message"), GARBAGE, ids=[str(body)[:30] for body, _, _ in GARBAGE])
def test_garbage_is_one_clear_error(server, body, status, message):
    found, content = post(server, body)
    assert found == status
    assert set(content) == {"error"}
    with pytest.raises(ValueError, match=message):
        raise ValueError(content["error"]["message"])


def test_garbage_of_the_protocol(server):
    chat = "/v1/chat/completions"
    for messages in (None, [], "hi", [{"role": "user"}], [{"role": "user", "content": 1}], [1]):
        assert post(server, {"messages": messages}, chat)[0] == 400
    assert post(server, {"messages": [{"role": "user", "content": "x" * 500}]}, chat)[0] == 400
    assert post(server, {}, "/v1/embeddings")[0] == 404
    assert post(server, {}, "/v1/completions", {"Content-Length": str(10**12)})[0] == 413
    assert post(server, {}, "/v1/completions", {"Content-Length": "9" * 5000})[0] == 413
    assert post(server, {}, "/v1/completions", {"Content-Length": "-5"})[0] == 411
    assert post(server, {"messages": [], "max_tokens": 1, "max_completion_tokens": 1}, chat)[0] == 400
    assert post(server, {}, "/update_weights_from_disk")[0] == 400
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=WAIT) as raw:
        raw.sendall(b"no http at all\r\n\r\n")
        assert b" 400 " in raw.recv(4096)


@pytest.mark.parametrize("path", ["/v1/completions", "/update_weights_from_disk"])
def test_a_web_page_is_refused(server, path):
    """A browser sends a page's POST to 127.0.0.1 without asking, as long as it is no JSON by its type."""
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}):
        assert post(server, {"prompt": [1]}, path, headers)[0] == 403
    assert post(server, {"prompt": [1]}, path, {"Content-Type": "text/plain"})[0] == 415


@pytest.mark.parametrize("settings", [{"context": 129}, {"context": -1}, {"rows": 0}, {"max_waiting": -1}])
def test_settings_that_are_refused(directories, settings):
    with pytest.raises(ValueError, match="legal"), serve.start(serve.Config(str(directories["tiny"]), **settings)):
        pass


def test_positions_are_those_of_the_context_that_is_served(directories, monkeypatch):
    """Models of two tables of positions, by the length of the text (longrope), are told how long it may be."""

    def load_model(directory, mesh, dtype, context):
        raise RuntimeError(f"context {context}")

    monkeypatch.setattr(serve.models, "load_model", load_model)
    for given, context in ((0, 128), (64, 64)):
        with (
            pytest.raises(RuntimeError, match=f"context {context}"),
            serve.start(serve.Config(str(directories["tiny"]), context=given)),
        ):
            pass


# ------------------------------------------------------------------------------------------------------- many clients


def test_among_64_clients_nobody_elses_answer_changes(server, client, directories):
    """Half of them ask properly; the others leave, break off, or send garbage."""
    expected = in_process(directories["tiny"], PROMPTS, 9, [0, 1, 2, 3], n=1, max_tokens=16)

    def ask(number: int):
        extra = {**IDS, "key": [9, number % 4]}
        prompt = PROMPTS[number % 4]
        return client.completions.create(
            model="tiny", prompt=prompt, max_tokens=16, logprobs=1, extra_body=extra
        ).choices

    def misbehave(number: int):
        how = number % 4
        if how == 0:  # does not wait for the answer
            with client_of(server, timeout=0.05) as client, contextlib.suppress(openai.APITimeoutError):
                client.completions.create(model="tiny", prompt=[number], max_tokens=16, n=3)
        elif how == 1:  # leaves in the middle of its own request, or of the answer
            with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
                raw.sendall(POST + b'Content-Length: 1000\r\n\r\n{"prompt": ')
        elif how == 2:
            with client_of(server) as client:
                stream = client.completions.create(model="tiny", prompt=[number], max_tokens=16, stream=True)
                next(iter(stream))
                stream.close()
        else:
            body, status, _ = GARBAGE[number % len(GARBAGE)]
            return post(server, body)[0] == status
        return True

    with concurrent.futures.ThreadPoolExecutor(64) as threads:
        good = [threads.submit(ask, number) for number in range(32)]
        bad = [threads.submit(misbehave, number) for number in range(32)]
        for number, future in enumerate(good):
            check(future.result(WAIT), expected[number % 4 : number % 4 + 1])
        assert all(future.result(WAIT) for future in bad)
    assert post(server, {"prompt": [1], "max_tokens": 1})[0] == 200


def test_requests_beyond_the_queue_are_refused(directories):
    with serving(directories["tiny"], max_waiting=0) as server:
        status, content = post(server, {"prompt": [1]})
    assert (status, content["error"]["message"]) == (429, "0 requests wait; try again later")


def test_a_client_that_sends_byte_by_byte_is_not_waited_for(server, monkeypatch):
    monkeypatch.setattr(serve, "SOCKET_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=WAIT) as raw:
        raw.sendall(POST + b"Content-Length: 1000\r\n\r\n")
        with contextlib.suppress(OSError):  # it is closed meanwhile
            for _ in range(1000):
                raw.sendall(b" ")
                if select.select([raw], [], [], 0.02)[0]:
                    break
        assert b" 408 " in raw.recv(4096)


def test_connections_beyond_the_last_place_are_closed(directories, monkeypatch):
    monkeypatch.setattr(serve, "MAX_CONNECTIONS", 1)
    with (
        serving(directories["tiny"]) as server,
        socket.create_connection(("127.0.0.1", server.server_port), timeout=WAIT) as first,
        socket.create_connection(("127.0.0.1", server.server_port), timeout=WAIT) as second,
    ):
        assert second.recv(4096) == b""
        first.sendall(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert b" 200 " in first.recv(4096)
        assert server.places.acquire(timeout=WAIT)


# ------------------------------------------------------------------------------------------------------------- weights


def test_weights_are_swapped_between_requests(directories, monkeypatch):
    with serving(directories["tiny"]) as server, client_of(server) as client:

        def ask():
            found = client.completions.create(
                model="tiny", prompt=[5, 6], max_tokens=16, seed=1, logprobs=1, extra_body=IDS
            )
            return found.choices, found.metadata["weight_version"]

        def update(name: str, version: str) -> tuple[int, dict]:
            body = {"model_path": str(directories.get(name, name)), "weight_version": version}
            return post(server, body, "/update_weights_from_disk")

        check(ask()[0], in_process(directories["tiny"], [[5, 6]], 1, [0], max_tokens=16))
        assert server.engine.lm.prepare is None  # once for all batches, and again for other weights
        prepared = []
        monkeypatch.setattr(engines, "prepare_once", lambda *args: prepared.append(args) or prepare_once(*args))
        for name in ("wider", "/nowhere"):
            status, content = update(name, "8")
            assert status == 400
            assert content["error"]["message"].startswith("the weights were not taken: ")
        assert ask()[1] == "0"
        assert update("other", "9")[0] == 200
        choices, version = ask()
        assert len(prepared) == 1
        check(choices, in_process(directories["other"], [[5, 6]], 1, [0], max_tokens=16))
        assert version == "9"
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT)
        connection.request("GET", "/health")
        assert json.loads(connection.getresponse().read())["weight_version"] == "9"
        connection.close()

        queue_jobs = Engine._put

        def with_an_update_behind(engine, *jobs):
            queue_jobs(engine, *jobs)
            queue_jobs(engine, _Update(directories["tiny"], "10"))

        monkeypatch.setattr(Engine, "_put", with_an_update_behind)  # the prompts of a call are one version's
        found = client.completions.create(
            model="tiny", prompt=[[5, 6], [7]], max_tokens=16, seed=1, logprobs=1, extra_body=IDS
        )
        assert found.choices[0].token_ids == choices[0].token_ids
        assert found.metadata["weight_version"] == "9"


def test_what_monitoring_reads(server, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=WAIT)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    counts = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert counts['rljax_weights{version="0"}'] == "1"
    assert int(counts["rljax_tokens_total"]) > 0
    assert int(counts['rljax_requests_total{status="200"}']) > 0
    assert counts["rljax_waiting"] == "0"


def test_a_bug_of_the_engine_ends_nobodys_wait(monkeypatch, server):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, "_sample", broken)
    assert post(server, {"prompt": [1]}) == (
        500,
        {"error": {"message": "RuntimeError: out of memory", "type": "server_error", "param": None, "code": 500}},
    )
    monkeypatch.undo()
    assert post(server, {"prompt": [1]})[0] == 200


@pytest.mark.parametrize("place", ["_sample", "read_answers"])
def test_a_bug_in_a_stream_is_its_last_event(monkeypatch, server, client, place):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Engine, place, broken)
    before = server.statuses.copy()
    with pytest.raises(openai.APIError, match="RuntimeError: out of memory"):
        list(client.completions.create(model="tiny", prompt=[1], stream=True))
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=WAIT) as raw:
        body = b'{"prompt": [1], "stream": true}'
        raw.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        answer = b"".join(iter(lambda: raw.recv(4096), b""))
    head, _, events = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    (event,) = events.decode().strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["error"]["code"] == 500
    assert server.statuses - before == {200: 2}


def test_what_waits_when_the_engine_ends_is_told_so(monkeypatch, server):
    taken, release = threading.Event(), threading.Event()

    def slow(engine, batch):
        taken.set()
        release.wait(WAIT)
        while True:  # a completion without an end
            yield SimpleNamespace(num_tokens=[0], tokens=np.zeros((1, 1), np.int32), logp=np.zeros((1, 1)))

    monkeypatch.setattr(Engine, "_sample", slow)
    served = server.engine
    engine = Engine(served.lm, {}, served.pieces, served.stop, 1, SEED, served.load)
    requests = [Request([1]) for _ in range(3)]
    engine.submit(requests[0])
    assert taken.wait(WAIT)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        engine.submit(requests[1])
        update = threads.submit(engine.update_weights, Path("/nowhere"), "1")
        while engine.num_waiting < 2:
            time.sleep(0.001)
        closed = threads.submit(engine.close)
        release.set()
        closed.result(WAIT)
        with pytest.raises(RuntimeError, match="the engine has ended"):
            update.result(WAIT)
    engine.submit(requests[2])
    for request in requests:
        assert request.stages.get(timeout=WAIT).problem == "the engine has ended"


def test_a_completion_is_looked_at_once(server):
    """For its end, however many stages it comes in: each token is read once, and stop strings are found across them."""

    class Counted(list):
        reads = 0

        def __getitem__(self, token):
            self.reads += 1
            return super().__getitem__(token)

    reader = SimpleNamespace(pieces=Counted([b"a", b"bc", b"d"]), stop=(3,))
    request = Request([1], max_tokens=50, stop_strings=(b"cda", b"never there"))
    tokens = np.array([[0] * 40 + [1, 2, 0, 0]])
    (end,) = ends = [_End()]
    for sampled in range(1, 45, 3):
        Engine._read_on(reader, request, SimpleNamespace(num_tokens=[sampled], tokens=tokens), 0, ends)
    assert (end.count, end.reason, reader.pieces.reads) == (43, "stop", 43)


def test_a_number_that_is_none_is_no_answer(monkeypatch, server):
    """JSON has no Infinity."""
    answers = [Answer([1], [-np.inf], "a", "length")]
    monkeypatch.setattr(Engine, "read_answers", lambda *_: answers)
    assert post(server, {"prompt": [1], "max_tokens": 1, "logprobs": 1})[0] == 500


def test_a_version_of_any_text_is_one_line_of_metrics(monkeypatch, server):
    monkeypatch.setattr(server.engine, "weights", Weights({}, 'a "b"\n\\c'))
    assert serve.metrics_text(server).splitlines()[-1] == r'rljax_weights{version="a \"b\"\n\\c"} 1'


def test_what_nobody_waits_for_is_not_sampled(server):
    request = Request([1], n=2)
    request.is_abandoned.set()
    before = server.engine.counts["batches"]
    server.engine.submit(request)
    assert post(server, {"prompt": [1]})[0] == 200
    assert server.engine.counts["batches"] == before + 1
    assert request.stages.empty()
