"""Reward models behind a URL: the protocol, and servers that refuse, stall or answer nonsense."""

import json
import re
import socket
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from rewards import servers
from rewards.test_score import COLUMNS, EOS, decode, rows_of
from rljax.rewards.remote import make_remote_reward
from rljax.rewards.score import make_score
from rljax.rewards.server import AnswerCache, Limits, Reply, ask_all, check_reachable, check_url, request_json
from rljax.rewards.worker import FAILED
from rljax.types import Trajectory, trajectory_of_tokens

PATIENT = Limits(**servers.GOOD_LIMITS, retries=0)
SHORT = Limits(timeout_seconds=0.2, step_timeout_seconds=60.0, retries=0)
ROWS = rows_of(COLUMNS)


def texts(*rows: tuple[str, str, int]) -> Trajectory:
    """Rows (prompt, completion, number of the prompt) of digits; a completion ends with EOS."""
    start = max(len(prompt) for prompt, _, _ in rows)
    width = start + 1 + max(len(completion) for _, completion, _ in rows)
    tokens, present, chosen = (np.zeros((len(rows), width), np.int32) for _ in range(3))
    for b, (prompt, completion, _) in enumerate(rows):
        ids = [int(digit) + 1 for digit in prompt + completion] + [EOS]
        here = slice(start - len(prompt), start - len(prompt) + len(ids))
        tokens[b, here] = ids
        present[b, here] = 1
        chosen[b, start : here.stop] = 1
    group = np.array([draw for _, _, draw in rows])
    return trajectory_of_tokens(tokens, present, jnp.asarray(chosen == 1), np.zeros(tokens.shape), group=group)


TRAJ = texts(("8", "12", 40), ("888", "3", 41), ("6", "3", 41), ("8", "", 40))
MANY = texts(*[("1", str(i), 40) for i in range(1, 8)])


def decode_all(tokens):
    """As `decode`, the end of a completion spelled out."""
    return "".join("$" if token == EOS else str(token - 1) for token in tokens)


def lengths(body):
    return [len(query) for query in body["query"]]


def test_the_protocol():
    """Prompt and completion with their special tokens; the column answer is the label."""
    columns = [{"answer": "12"}, {"label": 3}]
    with servers.serve(servers.rewards(lengths)) as server:
        reward = make_remote_reward(server.url + "/get_reward?model=a", decode_all, PATIENT)
        results = reward(TRAJ, rows_of(columns))
    (body,) = server.requests
    assert body == {
        "query": ["812$", "8883$", "63$", "8$"],
        "prompts": ["8", "888", "6", "8"],
        "labels": ["12", 3, 3, "12"],
    }
    assert [(result.value, result.status) for result in results] == [(4, "ok"), (5, "ok"), (3, "ok"), (2, "ok")]


def test_rows_go_in_batches_and_each_gets_its_own():
    with servers.serve(servers.rewards(lambda body: [float(query[:2]) for query in body["query"]])) as server:
        reward = make_remote_reward(server.url, decode_all, PATIENT, batch_size=2)
        results = reward(MANY, ROWS)
    assert sorted(len(body["query"]) for body in server.requests) == [1, 2, 2, 2]
    assert [result.value for result in results] == [11, 12, 13, 14, 15, 16, 17]


NONSENSE = {
    "a page": (servers.text("<html>busy</html>"), "invalid", "no JSON: '<html>busy"),
    "nothing": (servers.text(""), "invalid", "no JSON"),
    "not utf-8": (servers.text("\udcff".encode("utf-8", "surrogatepass").decode("latin-1")), "invalid", "no JSON"),
    "an error": (servers.text("out of memory", 500), "invalid", "HTTP 500: out of memory"),
    "no such page": (servers.text("{}", 404), "invalid", "HTTP 404"),
    "elsewhere": (servers.text("", 302), "invalid", "HTTP 302"),
    "a list": (servers.text("[1, 2, 3, 4]"), "invalid", "no list 'rewards' of 4 numbers"),
    "another key": (servers.text('{"scores": [1, 2, 3, 4]}'), "invalid", "no list 'rewards' of 4 numbers"),
    "a row less": (servers.rewards([1, 2, 3]), "invalid", "no list 'rewards' of 4 numbers"),
    "a row more": (servers.rewards([1, 2, 3, 4, 5]), "invalid", "no list 'rewards' of 4 numbers"),
    "a number": (servers.rewards(0.5), "invalid", "no list 'rewards' of 4 numbers"),
    "nulls": (servers.rewards([None] * 4), "invalid", "the reward is null; legal: a finite number"),
    "strings": (servers.rewards(["1.0"] * 4), "invalid", "the reward is .*1.0.*; legal: a finite number"),
    "truths": (servers.rewards([True] * 4), "invalid", "the reward is true"),
    "nested": (servers.rewards([[1.0]] * 4), "invalid", "the reward is .1.0."),
    "no numbers": (
        servers.text('{"rewards": [NaN, Infinity, -Infinity, 1e999]}'),
        "invalid",
        "the reward is (NaN|-?Inf)",
    ),
    "too large": (servers.rewards([10**400] * 4), "invalid", "the reward is 1000"),
    "deep": (servers.text("[" * 100_000), "invalid", "no JSON"),
    "cut": (servers.text('{"rewards": [1, 2, 3, 4', length=30), "(unreachable|invalid)", "Incomplete|no JSON"),
    "hangs up": (servers.hangs_up, "unreachable", "RemoteDisconnected|Reset"),
    "no http": (servers.trickles(b"hello\r\n\r\n"), "unreachable", "BadStatusLine"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_not_judged_and_never_zero(name):
    answer, status, words = NONSENSE[name]
    with servers.serve(answer) as server:
        results = make_remote_reward(server.url, decode_all, PATIENT)(TRAJ, ROWS)
        traj = make_score({}, decode, model_rewards={"remote": lambda *_: results})(TRAJ, ROWS)
    for result in results:
        assert result.value is None
        assert re.fullmatch(status, result.status)
        assert re.search(words, result.detail), result.detail
    assert np.isnan(traj.scores).all()
    assert np.isnan(traj.rewards).sum() == 4


@pytest.mark.parametrize(
    "answer",
    [
        servers.stalls,
        servers.trickles(b""),
        servers.trickles(b"HTTP/1.1 200 OK\r\nX: "),
        servers.trickles(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"),
        servers.trickles(b"HTTP/1.1 200 OK\r\n\r\n{"),
    ],
    ids=["stalls", "status", "headers", "body", "endless"],
)
def test_a_server_that_never_ends_its_answer_is_given_up(answer):
    with servers.serve(answer) as server:
        results = make_remote_reward(server.url, decode_all, SHORT)(TRAJ, ROWS)
    assert [result.status for result in results] == ["timeout"] * 4
    assert all(result.value is None for result in results)


def test_the_deadline_of_a_step_holds_for_all_requests_and_their_retries():
    """Requests would take 120 s each, and be repeated a thousand times."""
    limits = Limits(timeout_seconds=120, step_timeout_seconds=0.3, max_concurrent=2, retries=1000)
    with servers.serve(servers.stalls) as server:
        results = make_remote_reward(server.url, decode_all, limits, batch_size=1)(MANY, ROWS)
    assert [result.status for result in results] == ["timeout"] * 7
    assert len(server.requests) <= 2


def closed_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_closed_port_is_unreachable():
    url = f"http://127.0.0.1:{closed_port()}"
    results = make_remote_reward(url, decode_all, PATIENT)(TRAJ, ROWS)
    assert {result.status for result in results} == {"unreachable"} <= set(FAILED)
    with pytest.raises(ValueError, match=f"no server at {url} .*refused.*; start it first"):
        check_reachable(url)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/", "http://", "http://host:port/", "http:///path"])
def test_what_is_no_address(url):
    with pytest.raises(ValueError, match="no address of a server; legal: http://HOST:PORT/PATH"):
        check_url(url)


# -------------------------------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize(
    ("failures", "status", "tries", "legal"),
    [(2, 500, 3, True), (3, 500, 3, False), (2, 429, 3, True), (1, 404, 1, False), (1, 401, 1, False)],
)
def test_retries_are_bounded_and_a_wrong_request_is_not_repeated(failures, status, tries, legal):
    def answer(handler, body, server):
        failed = len(server.requests) <= failures
        servers.send(handler, '{"rewards": [1, 2, 3, 4]}' if not failed else "busy", status if failed else 200)

    with servers.serve(answer) as server:
        results = make_remote_reward(server.url, decode_all, PATIENT._replace(retries=2))(TRAJ, ROWS)
    assert len(server.requests) == tries
    assert [result.status for result in results] == ["ok" if legal else "invalid"] * 4


def test_as_many_requests_as_allowed_are_in_flight():
    """Each waits until three are there: with two in flight none would be answered."""
    together = threading.Barrier(3, timeout=100)

    def ask(question, seconds):
        together.wait()
        return question

    limits = PATIENT._replace(max_concurrent=3)
    assert ask_all(ask, list("abcdef"), limits) == [Reply(letter, "ok") for letter in "abcdef"]
    assert ask_all(ask, [], limits) == []


def test_a_bug_is_raised_where_it_is_seen():
    def ask(question, seconds):
        raise KeyError(question)

    with pytest.raises(KeyError, match="a"):
        ask_all(ask, ["a"], PATIENT)


def test_an_endless_answer_is_cut():
    with servers.serve(servers.text(json.dumps("x" * 2**24))) as server, pytest.raises(RuntimeError, match="16777216"):
        request_json(server.url, {})


# ---------------------------------------------------------------------------------------------------------------- cache


def test_answers_are_asked_for_once_and_outlive_the_process(tmp_path):
    file = tmp_path / "run" / "answers.jsonl"
    with servers.serve(servers.rewards(lambda body: [0.1 + len(q) / 3 for q in body["query"]])) as server:
        first = make_remote_reward(server.url, decode_all, PATIENT, AnswerCache(file))(TRAJ, ROWS)
        again = make_remote_reward(server.url, decode_all, PATIENT, AnswerCache(file))(TRAJ, ROWS)
        assert again == first
        assert len(server.requests) == 1
        other = rows_of([{"answer": "13"}, COLUMNS[1]])  # another answer: two of the rows are other questions
        make_remote_reward(server.url, decode_all, PATIENT, AnswerCache(file))(TRAJ, other)
        assert [len(body["query"]) for body in server.requests] == [4, 2]


def test_equal_rows_are_one_question():
    twice = texts(*[("12", "3", 40)] * 3)
    with servers.serve(servers.rewards(lengths)) as server:
        results = make_remote_reward(server.url, decode_all, PATIENT)(twice, ROWS)
    assert [len(body["query"]) for body in server.requests] == [1]
    assert [result.value for result in results] == [4, 4, 4]


def asks(*replies):
    """An `ask` that gives these replies, call by call, and counts the calls."""
    left = list(replies)

    def ask(questions):
        return [left.pop(0) for _ in questions]

    return ask


BUSY = Reply(None, "timeout", "busy")
ONE = Reply(1.0, "ok")


def test_a_failure_is_kept_for_its_draw_once_the_run_went_on(tmp_path):
    cache = AnswerCache(tmp_path / "answers.jsonl")
    assert cache.fetch(["a", "b"], [7, 8], asks(BUSY, ONE)) == [BUSY, ONE]
    cache.fetch(["c"], [9], asks(ONE))  # the run went on
    resumed = AnswerCache(tmp_path / "answers.jsonl")
    assert resumed.fetch(["a", "b"], [7, 8], asks()) == [BUSY, ONE]
    assert resumed.fetch(["a"], [17], asks(ONE)) == [ONE]  # drawn again later: asked again
    assert AnswerCache(tmp_path / "answers.jsonl").fetch(["a"], [7], asks()) == [ONE]


def test_a_failure_that_stopped_the_run_is_forgotten(tmp_path):
    cache = AnswerCache(tmp_path / "answers.jsonl")
    assert cache.fetch(["a", "b"], [7, 8], asks(BUSY, ONE)) == [BUSY, ONE]
    assert AnswerCache(tmp_path / "answers.jsonl").fetch(["a", "b"], [7, 8], asks(ONE)) == [ONE, ONE]


def test_a_line_that_was_not_written_to_its_end_is_cut_off(tmp_path):
    file = tmp_path / "answers.jsonl"
    AnswerCache(file).fetch(["a"], [1], asks(ONE))
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    cache = AnswerCache(file)
    assert file.read_bytes() == whole
    assert cache.fetch(["a", "b"], [1, 2], asks(ONE)) == [ONE, ONE]
    file.write_bytes(b"[1]\n" + whole)
    with pytest.raises(ValueError, match=r"answers\.jsonl, line 1: no answer of a server; delete the line"):
        AnswerCache(file)
