"""A judge behind a chat endpoint: what it is asked, how its replies are read, and that no order counts."""

import functools
import json
import re

import numpy as np
import pytest

from experiments.common.settings import Reward
from experiments.common.verifiers import check_rubric_columns
from rewards import servers
from rewards.test_remote import PATIENT, SHORT, texts
from rewards.test_score import decode, rows_of
from rljax.data.files import Table
from rljax.rewards import judge
from rljax.rewards.judge import Endpoint, check_rubric, make_judge, read_ranking, read_score, read_winner
from rljax.rewards.score import RewardError, make_score
from rljax.rewards.server import AnswerCache

ROWS = rows_of([{"answer": "12", "level": "easy"}, {"answer": "3", "level": "hard"}])
TRAJ = texts(("8", "12", 40), ("8", "5", 40), ("77", "3", 41), ("8", "9", 40), ("77", "31", 41))
RUBRICS = {
    "score": "{level} {prompt}={answer}: {completion} {{}}",
    "pairwise": "{completion_a} or {completion_b}",
    "ranking": "{completions}",
}


def judged(server, compare="score", traj=TRAJ, limits=PATIENT, **arguments):
    endpoint = Endpoint(server.url + "/v1", "made-up")
    arguments = {"rubric": RUBRICS[compare]} | arguments
    return make_judge(endpoint, decode, compare, limits=limits, **arguments)(traj, ROWS)


def values(results):
    return [result.value for result in results]


def test_a_score_by_a_rubric():
    """The number after the last Score: over the scale; columns, prompt and completion stand in the question."""
    replies = {"12": "A thought: Score: 3\n**Score: 8/10**", "5": "score: 2.5", "9": "Score:**0**"}

    def reply(question):
        return replies.get(question.split(": ")[1].split()[0], "Score: 10")

    with servers.serve(servers.chat(reply)) as server:
        assert values(judged(server)) == [0.8, 0.25, 1, 0, 1]
        assert values(judged(server, scale=20.0)) == [0.4, 0.125, 0.5, 0, 0.5]
    questions = {body["messages"][0]["content"] for body in server.requests}
    assert questions == {
        "easy 8=12: 12 {}",
        "easy 8=12: 5 {}",
        "easy 8=12: 9 {}",
        "hard 77=3: 3 {}",
        "hard 77=3: 31 {}",
    }
    assert {body["model"] for body in server.requests} == {"made-up"}
    assert {body["temperature"] for body in server.requests} == {0}


def test_a_conversation_is_shown_with_its_roles():
    asked = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "{why}?"}]},
    ]
    rows = rows_of([{"prompt": asked}, {"messages": [*asked, {"role": "assistant", "content": "no"}]}])
    with servers.serve(servers.chat(lambda question: "Score: 1")) as server:
        reward = make_judge(Endpoint(server.url, "m"), decode, rubric="{prompt}|{completion}", limits=PATIENT)
        assert values(reward(texts(("8", "12", 40), ("8", "3", 41)), rows)) == [0.1, 0.1]
    found = {body["messages"][0]["content"] for body in server.requests}
    assert found == {"system: Be kind.\n\nuser: {why}?|" + completion for completion in ("12", "3")}


def test_calls_of_tools_are_shown_and_every_turn_of_the_answer_is_not():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
    ]
    answer = [{"role": "assistant", "content": "It is 2."}, {"role": "assistant", "content": "Anything else?"}]
    wanted = 'user: 1 + 1?\n\nassistant: {"name": "add", "arguments": {"a": 1}}\n\ntool: 2'
    assert judge._prompt_text({"prompt": asked}, "") == judge._prompt_text({"messages": asked + answer}, "") == wanted


@pytest.mark.parametrize(
    ("answer", "rubric", "message"),
    [
        (None, "{completion} against {answer}", "column 'answer' is null; legal in a template: text and numbers"),
        (["a"], "{completion} against {answer}", "column 'answer' is a list; legal"),
        (4, "{completion} against {answer[x]}", "the rubric of the judge does not fit"),
    ],
)
def test_a_column_of_the_rubric_that_is_no_text_is_an_error(answer, rubric, message, tmp_path):
    """Before anything is asked; and by the scripts, before anything is loaded."""
    row = judge._Row(40, "c", {"prompt": "p", "answer": answer})
    with pytest.raises(RewardError, match=f"^prompt 40: {message}"):
        judge._fill(rubric, row, completion=row.completion)
    (tmp_path / "rubric.txt").write_text(rubric)
    table = Table("rows.jsonl", [{"prompt": "p", "answer": {"x": "y"} if "[" in rubric else 3}, row.fields], [1, 2])
    with pytest.raises(ValueError, match=rf"^rows\.jsonl, line 2: {message}"):
        check_rubric_columns(table, Reward(rubric=str(tmp_path / "rubric.txt")))


def larger(question):
    """Prefers the larger number; the one shown first where they are ten or fewer apart."""
    a, b = map(int, re.findall(r"\d+", question)[-2:])
    return f"Winner: {'A' if a >= b - 10 else 'B'}"


def test_pairs_are_judged_in_both_orders():
    """12, 5 and 9 are near each other: the place decides, both orders cancel. 31 beats 3 in both."""
    with servers.serve(servers.chat(larger)) as server:
        results = judged(server, "pairwise")
    assert values(results) == [0.5, 0.5, 0, 0.5, 1]
    assert len(server.requests) == 3 * 2 + 2 * 1


def test_a_win_is_the_mean_over_the_others_and_a_tie_is_half():
    traj = texts(("8", "1", 40), ("8", "2", 40), ("8", "3", 40), ("8", "1", 40))

    def reply(question):
        a, b = map(int, re.findall(r"\d", question))
        return "winner: TIE" if {a, b} == {1, 2} else f"So be it.\nWinner: **{'A' if a > b else 'B'}**"

    with servers.serve(servers.chat(reply)) as server:
        results = judged(server, "pairwise", traj)
    assert len(server.requests) == 6  # three texts; equal texts are no question
    np.testing.assert_allclose(values(results), [(0.5 + 0 + 0.5) / 3, (0.5 + 0 + 0.5) / 3, 1, (0.5 + 0 + 0.5) / 3])


def test_a_pair_counts_where_both_orders_were_judged():
    """The judge says nothing whenever it sees 5 first."""

    def reply(question):
        return "I cannot say" if question.startswith("5") else larger(question)

    with servers.serve(servers.chat(reply)) as server:
        results = judged(server, "pairwise")
    assert values(results) == [0.5, None, 0, 0.5, 1]
    assert results[1].status == "invalid"
    assert "legal: a line 'Winner: A', 'Winner: B' or 'Winner: tie'" in results[1].detail


def test_rankings_are_asked_for_in_an_order_and_its_reverse():
    """The judge ranks by size, but puts whatever stands first before all others."""

    def reply(question):
        shown = re.findall(r"<response (\d)>\n(\d+)\n</response \d>", question)
        order = [shown[0], *sorted(shown[1:], key=lambda item: -int(item[1]))]
        return "Ranking: " + " > ".join(number for number, _ in order)

    with servers.serve(servers.chat(reply)) as server:
        results = judged(server, "ranking")
    assert len(server.requests) == 4
    # 12, 5, 9: 12 9 5 and, from 9 5 12, 9 12 5. 3, 31: 3 31 and 31 3.
    np.testing.assert_allclose(values(results), [0.75, 0, 0.5, 0.75, 0.5])


def test_a_group_of_one_cannot_be_compared():
    with servers.serve(servers.chat(larger)) as server:
        for compare in ("pairwise", "ranking"):
            with pytest.raises(RewardError, match="one completion to prompt 41; legal: at least two to each prompt"):
                judged(server, compare, texts(("8", "1", 40), ("8", "2", 40), ("8", "3", 41)))


# -------------------------------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Score: 7", 7),
        ("score:7.25", 7.25),
        ("**Score:** 7", 7),
        ("Score: 7/10", 7),
        ("Score: 7 out of 10.", 7),
        ("Score: 7.", 7),
        ("Score: 3, no. Score: 4", 4),
        ("Score: 10", 10),
        ("7", None),
        ("", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: seven", None),
        ("Score: NaN", None),
        ("Score: 1e9", None),
        ("Score: 7.5.1", None),
        ("Score: 3\nScore: unclear", None),
        ("underscore: 7", None),
        ("Score: " + "9" * 5000, None),
    ],
)
def test_a_score_is_read_by_one_rule(reply, value):
    assert read_score(reply, 1.0) == (value if value is not None and value <= 1 else None)
    assert read_score(reply, 10.0) == (None if value is None else value / 10)


def test_a_winner_is_read_by_one_rule():
    for reply, value in {
        "Winner: A": 1,
        "winner: b": 0,
        "Winner: A, but it could be B. Winner: tie": 0.5,
        "**Winner: A**": 1,
        "A": None,
        "Winner: Anna": None,
        "Winner: neither": None,
        "Winner:": None,
        "": None,
    }.items():
        assert read_winner(reply) == value


def test_a_ranking_holds_every_number_once():
    for reply, value in {
        "Ranking: 2 > 3 > 1": [2, 3, 1],
        "Ranking: [2], [3], [1]\nas 7 said": [2, 3, 1],
        "Ranking: 2 > 3": None,
        "Ranking: 2 > 3 > 3": None,
        "Ranking: 2 > 3 > 4": None,
        "Ranking: 2 > 3 > 1 > 1": None,
        "2 > 3 > 1": None,
        "": None,
    }.items():
        assert read_ranking(reply, 3) == value


NONSENSE = {
    "a page": servers.text("<html>"),
    "no choices": servers.text("{}"),
    "empty": servers.text('{"choices": []}'),
    "null": servers.text('{"choices": [{"message": {"content": null}}]}'),
    "a number": servers.text('{"choices": [{"message": {"content": 7}}]}'),
    "an error": servers.text("busy", 503),
    "chatter": servers.chat(lambda question: "I would rather not."),
}


@pytest.mark.parametrize("compare", ["score", "pairwise", "ranking"])
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_is_not_judged_and_never_zero(name, compare):
    with servers.serve(NONSENSE[name]) as server:
        results = judged(server, compare)
    assert values(results) == [None] * 5
    assert {result.status for result in results} == {"invalid"}
    assert np.isnan(make_score({}, decode, model_rewards={"judge": lambda *_: results})(TRAJ, ROWS).scores).all()


def test_a_judge_that_stalls_is_given_up():
    with servers.serve(servers.stalls) as server:
        results = judged(server, "pairwise", limits=SHORT)
    assert {(result.value, result.status) for result in results} == {(None, "timeout")}


def test_replies_are_kept_on_disk_with_their_text(tmp_path):
    file = tmp_path / "answers.jsonl"
    with servers.serve(servers.chat(larger)) as server:
        first = judged(server, "pairwise", cache=AnswerCache(file))
        count = len(server.requests)
        assert judged(server, "pairwise", cache=AnswerCache(file)) == first
        assert len(server.requests) == count
    assert {json.loads(line)["value"] for line in file.read_text().splitlines()} == {"Winner: A", "Winner: B"}


# -------------------------------------------------------------------------------------------------------------- rubrics


@pytest.mark.parametrize(
    ("rubric", "compare", "message"),
    [
        ("Rate {prompt}", "score", r"the rubric lacks \{completion\}"),
        ("{completion_a}", "pairwise", r"the rubric lacks \{completion_b\}"),
        ("{completion}", "ranking", r"the rubric lacks \{completions\}"),
        ('{completion} as {"score": N', "score", "the rubric does not parse"),
        ("{completion} }", "score", r"does not parse .*; \{\{ and \}\} write a brace"),
    ],
)
def test_a_rubric_without_the_completion_is_refused(rubric, compare, message):
    with pytest.raises(ValueError, match=message):
        check_rubric(rubric, compare)


def test_a_column_that_the_rubric_names_and_the_data_lack_is_one_error():
    judge_of = functools.partial(make_judge, Endpoint("http://h", "m"), decode, rubric="{completion} {solution}")
    with pytest.raises(
        RewardError, match=r"prompt 40: .* \('solution'\); legal in braces: answer, completion, level, prompt"
    ):
        judge_of(cache=AnswerCache())(TRAJ, ROWS)


def test_braces_of_a_completion_are_not_filled_in():
    row = judge._Row(1, "{answer}", {"prompt": "{completion}", "answer": "42"})
    assert judge._fill("{prompt}|{completion}", row, completion=row.completion) == "{completion}|{answer}"


def test_the_rubrics_that_come_with_it_fit():
    for compare, rubric in judge.RUBRICS.items():
        check_rubric(rubric, compare)
        names = re.findall(r"\{(\w+)\}", rubric)
        assert set(names) == {"prompt", *judge.FIELDS[compare]}


def test_the_first_model_that_is_served():
    with servers.serve(servers.stalls) as server:
        assert judge.served_model(server.url + "/v1") == "made-up"
        with pytest.raises(ValueError, match=r"/v2/models does not list its models \(no data.0..id in the answer\)"):
            judge.served_model(server.url + "/v2")
