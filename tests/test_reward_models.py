"""Reward models behind `--rewards`: which directories are legal, what they score, and a run of grpo.py with one."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import grpo
from experiments.common import models
from experiments.common.reward_models import PIECE_TOKENS, load_process_reward_model, load_reward_model
from experiments.common.rewards import Rewards, check_verdicts, read_rewards
from experiments.common.settings import Batches, MeshShape, PromptData, Reward, Sampling, Weights
from models import tiny
from rewards import servers
from rljax import algorithms as a
from rljax.data import examples
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.rewards.score import RewardError
from rljax.train.mesh import make_mesh
from rljax.types import PromptBatch, trajectory_of_tokens
from test_grpo_experiment import LETTERS, RAW, ROWS, metrics, write_prompts, write_tokenizer

END = 2  # </s>


def write_reward_model(directory: Path, letters: str = LETTERS, **fields) -> Path:
    """A sequence classifier with one label, random but for a head that is not small."""
    raw = RAW | {"architectures": ["LlamaForSequenceClassification"], "vocab_size": 3 + len(letters)} | fields
    tensors = tiny.tensors_of(raw) | {"score.weight": np.linspace(-1, 1, raw["hidden_size"], dtype=np.float32)[None]}
    write_tokenizer(tiny.write(directory, raw, tensors), letters)
    return directory


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """The policy, a reward model with its vocabulary, and one with the letters in another order and others beside."""
    root = tmp_path_factory.mktemp("rewards")
    write_tokenizer(tiny.write(root / "policy", RAW, tiny.tensors_of(RAW)))
    write_reward_model(root / "same")
    write_reward_model(root / "other", LETTERS[::-1] + "0123456789")
    return root


def score_of(directory: Path, ids: list[int]) -> float:
    """The head after the last of these tokens, of the row alone."""
    config = hf.read_config(directory, reward_model=True)
    tokens = jnp.array([ids])
    positions = jnp.arange(len(ids))[None]
    hidden, _ = decoder.forward(config, hf.load(directory, config), tokens, positions, jnp.ones_like(tokens))
    head = load_file(directory / "model.safetensors")["score.weight"][0]
    return float(np.asarray(hidden[0, -1], np.float64) @ head)


def rollout(texts: list[tuple[str, str, bool]], tokenizer, columns: int = 24):
    """Rows (prompt, completion, whether it ended) as sampled: prompts end in one column, padding on both sides."""
    tokens = np.zeros((len(texts), columns), np.int32)
    present, chosen, terminated = (np.zeros(tokens.shape, bool) for _ in range(3))
    whole = []
    for b, (prompt, completion, ended) in enumerate(texts):
        first = tokenizer.encode(prompt)
        second = tokenizer.encode(completion)[1:] + [END] * ended
        start = columns // 2 - len(first)
        end = columns // 2 + len(second)
        tokens[b, start:end] = first + second
        present[b, start:end] = True
        chosen[b, columns // 2 : end] = True
        terminated[b, end - 1] = ended
        whole.append(first + second)
    zeros = np.zeros(tokens.shape, np.float32)
    return trajectory_of_tokens(tokens, present.astype(int), jnp.asarray(chosen), zeros, terminated=terminated), whole


TEXTS = [("once upon", " a time.", True), ("a", "b", False), ("the cat", ", a dog", True), ("a b", "c", True)] * 3


@pytest.mark.parametrize("mesh", [{"fsdp": 1, "tensor": -1}, {"fsdp": 4, "tensor": 2}])
def test_the_sampled_ids_are_scored_at_the_last_token(directories, mesh):
    policy = load_tokenizer(str(directories / "policy"), 37)
    traj, whole = rollout(TEXTS[:5], policy)  # five rows over four devices
    reward = load_reward_model(directories / "same", make_mesh(**mesh), policy)
    want = [score_of(directories / "same", ids) for ids in whole]
    np.testing.assert_allclose(reward(traj, None), want, rtol=1e-4, atol=1e-4)


def test_another_vocabulary_reads_the_text(directories, capsys):
    policy = load_tokenizer(str(directories / "policy"), 37)
    traj, _ = rollout(TEXTS[:4], policy)
    mesh = make_mesh(fsdp=2, tensor=4)
    reward = load_reward_model(directories / "other", mesh, policy)
    assert "another vocabulary" in capsys.readouterr().out
    ids = {letter: 3 + i for i, letter in enumerate(LETTERS[::-1] + "0123456789")}
    whole = [[1, *(ids[letter] for letter in a + b)] + [END] * ended for a, b, ended in TEXTS[:4]]
    want = [score_of(directories / "other", row) for row in whole]
    rows = PromptBatch(np.zeros((4, 1)), np.ones((4, 1)), np.arange(4), [{}] * 4, 4)
    np.testing.assert_allclose(reward(traj.replace(group=np.arange(4)), rows), want, rtol=1e-4, atol=1e-4)


def test_a_conversation_is_encoded_with_the_other_template(directories, tmp_path):
    """Its ends of turns are other tokens than those that were sampled; a completion that was cut has none."""
    other = write_reward_model(tmp_path / "chat", LETTERS + "0123456789")
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    about = json.loads((other / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (other / "tokenizer_config.json").write_text(json.dumps(about))
    policy = load_tokenizer(str(directories / "policy"), 37)
    traj, _ = rollout([("sampled", " a time.", True), ("as if", "b c", False)], policy)
    messages = [{"role": "user", "content": "why?"}]
    answered = [*messages, {"role": "assistant", "content": "ignored"}]
    columns = [{"prompt": messages}, {"messages": answered}]
    rows = PromptBatch(np.zeros((2, 1)), np.ones((2, 1)), np.arange(2), columns, 2)
    reward = load_reward_model(other, make_mesh(fsdp=2, tensor=4), policy)
    tokenizer = load_tokenizer(str(other), 47)
    whole = [tokenizer.encode_more("user:why?</s>assistant:" + text) for text in (" a time.</s>", "b c")]
    want = [score_of(other, ids) for ids in whole]
    np.testing.assert_allclose(reward(traj.replace(group=np.arange(2)), rows), want, rtol=1e-4, atol=1e-4)


def test_steps_are_judged_behind_their_separator(directories):
    """σ of the head behind the comma of each step; a last step without one is read with one, in place of what ends it.

    These are the tokens at which `data.examples.steps` puts the labels of training.
    """
    policy = load_tokenizer(str(directories / "policy"), 37)
    texts = [("once", "a,b c, d", True), ("as", "if", False), ("once", "a,b,", True), ("as", "", True)]
    traj, _ = rollout(texts, policy)
    want = []
    for prompt, completion, _ in texts[:3]:
        row = {"prompt": prompt, "completions": completion.removesuffix(",").split(",")}
        learned = examples.steps(row | {"labels": [None] * len(row["completions"])}, policy, ",")
        ids = learned.example.prompt + learned.example.completion
        ends = [len(learned.example.prompt) + i for i, is_end in enumerate(learned.step_ends) if is_end]
        assert [ids[end] for end in ends] == policy.encode_more(",") * len(ends)
        want.append([score_of(directories / "same", ids[: end + 1]) for end in ends])
    want.append([score_of(directories / "same", policy.encode("as,"))])
    want = [1 / (1 + np.exp(-np.array(logits))) for logits in want]

    def load(per_step, name="same"):
        mesh = make_mesh(fsdp=2, tensor=4)
        return load_process_reward_model(directories / name, mesh, policy, separator=",", per_step=per_step)(traj, None)

    np.testing.assert_allclose(load(False), [min(probabilities) for probabilities in want], rtol=1e-4)
    found = load(True)
    for row, probabilities in enumerate(want):
        np.testing.assert_allclose(found.scores[row][found.ends[row]], probabilities, rtol=1e-4)
    last = [np.flatnonzero(traj.mask[row])[-1] for row in (0, 1, 3)]
    assert np.asarray(found.ends)[[0, 1, 3], last].all()  # the reward of a last step stands where the completion ends
    with pytest.raises(
        ValueError, match=r"other judges steps, and its vocabulary is not the policy's; legal: the same"
    ):
        load(True, "other")


def test_pieces_bound_what_is_read_at_a_time_and_change_nothing(directories, monkeypatch):
    policy = load_tokenizer(str(directories / "policy"), 37)
    traj, _ = rollout(TEXTS, policy)
    reward = load_reward_model(directories / "same", make_mesh(fsdp=2, tensor=4), policy)
    want = reward(traj, None)
    assert PIECE_TOKENS >= 12 * 24
    monkeypatch.setattr("experiments.common.reward_models.PIECE_TOKENS", 50)  # two rows a device: four, four and four
    np.testing.assert_allclose(reward(traj, None), want, rtol=1e-5, atol=1e-5)


LONGROPE = tiny.rope(50.0, "longrope", original_max_position_embeddings=12, **tiny.LONG)


@pytest.mark.parametrize("fields", [{"max_position_embeddings": 12}, LONGROPE], ids=["context", "longrope"])
def test_a_row_longer_than_the_context_is_not_judged(fields, directories, tmp_path):
    """Nor one that longrope has another table for: a reward model is trained with that of short texts."""
    write_reward_model(tmp_path / "short", **fields)
    policy = load_tokenizer(str(directories / "policy"), 37)
    traj, whole = rollout([("once", "upon a", True), ("a", "bcdef", True)], policy)
    assert [len(ids) for ids in whole] == [12, 8]
    mesh = make_mesh(fsdp=1, tensor=-1)
    reward = load_reward_model(tmp_path / "short", mesh, policy)
    assert np.isnan(reward(traj, None)).tolist() == [False, False]
    traj, _ = rollout([("once", "upon a ", True), ("a", "bcdef", True)], policy)
    assert np.isnan(reward(traj, None)).tolist() == [True, False]


def test_a_reward_model_is_not_trained_on_rows_of_another_table(tmp_path):
    write_reward_model(tmp_path, **LONGROPE)
    mesh = make_mesh(fsdp=1, tensor=-1)
    load = partial(models.load_pretrained, str(tmp_path), Weights(), mesh, reference=False, reward_model=True)
    message = r"a row of 13 tokens: .* \(longrope\) beyond 12, .*; legal: --data.max_tokens 12"
    with pytest.raises(ValueError, match=message):
        load(13)
    assert load(12)[0].ropes == hf.read_config(tmp_path, reward_model=True).ropes


def test_items_of_rewards(directories):
    verifiers = {"one": len, "two": len}
    model = str(directories / "same")
    found = read_rewards(("two=0.5", f"{model}=2", "one"), verifiers, Reward())
    assert found.verifiers == {"two": len, "one": len}
    assert found.directories == {model: directories / "same"}
    assert found.weights == {"two": 0.5, model: 2.0, "one": 1.0}


def test_conditions_of_items(directories):
    """What follows @ is a condition where it is the name of a reward before it."""
    verifiers = {"one": len, "two": len, "a@b": len}
    model = str(directories / "same")
    items = ("one", "two=0.5@one", f"{model}@two", f"process:{model}=2@{model}", "a@b=3")
    found = read_rewards(items, verifiers, Reward())
    process = f"process:{model}"
    assert found.weights == {"one": 1, "two": 0.5, model: 1, process: 2, "a@b": 3}
    assert found.conditions == {"two": "one", model: "two", process: model}
    assert found.directories == {model: Path(model), process: Path(model)}
    assert found.process == {process}
    for item in ("two@three", "two=1@three", "two@one=1"):
        with pytest.raises(ValueError, match=rf"reward '{item}'; legal: .* and with @NAME of one before it"):
            read_rewards(("one", item), verifiers, Reward())


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("three", "reward 'three'; legal: one, the directory of a reward model, process:DIRECTORY, judge:URL"),
        ("one=a=2", "reward 'one=a=2'; legal: one, the"),
        ("one=", "reward 'one='; legal: one, the"),
        ("one=nan", "reward 'one=nan'; legal: one, the"),
        ("no/model", "no directory no/model, and it cannot be had from the hub"),
        ("process:", "reward 'process:'; legal: one, the"),
        ("", "reward ''; legal: one, the"),
        ("judge:localhost", "'localhost' is no address of a server; legal: http://HOST:PORT/PATH"),
        ("remote:http://host/?a=2", "reward 'remote:http://host/.a=2'; .*with one where the name holds a ="),
        ("remote:http://host/?a=b&c=2", "reward .*&c=2'; .*with one where the name holds a ="),
        ("remote:http://host/?a=b", "reward 'remote:http://host/.a=b'; .*with one where the name holds a ="),
        ("policy", "holds no score.weight: it is no reward model"),
        ("empty", "no model in .*empty"),
        ("labels", r"score.weight has 2 labels; legal: 1"),
    ],
)
def test_what_is_no_reward_is_refused(item, message, directories, tmp_path):
    (tmp_path / "empty").mkdir()
    write_reward_model(tmp_path / "labels")
    tensors = load_file(tmp_path / "labels" / "model.safetensors")
    tensors["score.weight"] = np.repeat(tensors["score.weight"], 2, axis=0)
    save_file(tensors, tmp_path / "labels" / "model.safetensors")
    place = {"policy": directories, "empty": tmp_path, "labels": tmp_path}.get(item)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_rewards((str(place / item) if place else item,), {"one": len}, Reward())


def test_a_score_of_a_model_says_not_what_is_correct():
    verifier, model = {"one": len}, {"rm": Path("rm")}
    alone = Rewards({}, model, {}, {"rm": 1.0}, {}, set(), False, Reward())
    judge = alone._replace(directories={}, servers={"judge:http://h/v1": len})
    for rewards in (alone, judge):
        for algorithm, asks, settings in (
            (a.rft(), "this algorithm", {}),
            (a.grpo(), "a pass rate", {"max_pass_rate": 0.9}),
        ):
            with pytest.raises(
                ValueError, match=rf"{asks} asks which completions are correct, .*; legal: a verifier in "
            ):
                check_verdicts(rewards, algorithm, PromptData(**settings))
        check_verdicts(rewards, a.grpo(), PromptData())
    check_verdicts(alone._replace(verifiers=verifier), a.rft(), PromptData(max_pass_rate=0.9))
    check_verdicts(judge._replace(servers={"remote:http://h": len}), a.maxrl(), PromptData())


def test_a_reward_named_twice_is_refused():
    for second in ("one", "one=2", "one@one"):
        with pytest.raises(ValueError, match="'one' is named twice"):
            read_rewards(("one", second), {"one": len}, Reward())


def test_servers_are_tried_before_anything_is_loaded(directories, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with servers.serve(servers.stalls) as server:
        judge, remote = f"judge:{server.url}/v1", f"remote:{server.url}"
        with_query = read_rewards((f"{remote}/?version=2=0.5",), {}, Reward())
        assert with_query.weights == {f"{remote}/?version=2": 0.5}
        found = read_rewards((f"{judge}=0.5", remote), {}, Reward())
        assert (list(found.servers), found.weights) == ([judge, remote], {judge: 0.5, remote: 1.0})
        with pytest.raises(ValueError, match=r"/models does not list its models"):
            read_rewards((f"judge:{server.url}",), {}, Reward())
        with pytest.raises(FileNotFoundError, match="absent"):
            read_rewards((judge,), {}, Reward(rubric="/absent"))
        with pytest.raises(ValueError, match=r"reward.server_requests = 0; legal: above 0"):
            read_rewards((remote,), {}, Reward(server_requests=0))
    for item in (judge, remote):
        with pytest.raises(ValueError, match=rf"no server at {server.url}.*; start it first"):
            grpo.main(grpo.Config(model="/absent", prompts="/absent", rewards=(item,)))


def config(directories, root: Path, **fields) -> grpo.Config:
    """Two prompts a step with two completions each."""
    return grpo.Config(
        model=str(directories / "policy"),
        prompts=write_prompts(root / "prompts.jsonl", ROWS),
        batches=Batches(prompts=2, num_generations=2),
        sampling=Sampling(max_tokens=8),
        eval_prompts=2,
        eval_samples=4,
        save_every=1,
        directory=str(root / "run"),
        mesh=MeshShape(fsdp=1, tensor=-1),
        **fields,
    )


def test_a_run_with_a_reward_model(directories, tmp_path):
    """The model's score is a column beside the verifier's, and the reward is their weighted sum."""
    model = str(directories / "same")
    cfg = config(directories, tmp_path, rewards=(f"{model}=0.25", "animals"), steps=1)
    result = grpo.main(cfg)
    (record,) = metrics(cfg.directory)
    want = record["reward/animals"] + 0.25 * record[f"reward/{model}"]
    assert record["reward"] == pytest.approx(want)
    assert record[f"reward/{model}"] != 0
    assert record["frac_reward_failed"] == 0
    assert np.isfinite(result["after"]["reward"])
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["scores"].keys() == {"animals", model}
    with pytest.raises(ValueError, match="reward 'animal'"):
        grpo.main(dataclasses.replace(cfg, model="/absent", rewards=("animal",)))


def test_process_grpo_rewards_each_step_and_other_algorithms_the_least(directories, tmp_path):
    name = f"process:{directories / 'same'}"
    cfg = config(directories, tmp_path, rewards=(name,), steps=1, reward=Reward(step_separator=" "))
    each = dataclasses.replace(cfg, algorithm="grpo_process", directory=str(tmp_path / "each"))
    grpo.main(cfg)
    grpo.main(each)
    (least,), (of_steps,) = metrics(cfg.directory), metrics(each.directory)
    assert least[f"reward/{name}"] == of_steps[f"reward/{name}"] == pytest.approx(least["reward"])
    assert 0 < least["reward"] < of_steps["reward"]  # a sum over the steps
    with pytest.raises(ValueError, match="learns from steps, and no reward judges them; legal: process:DIRECTORY"):
        grpo.main(dataclasses.replace(each, model="/absent", rewards=("animals",)))


def test_a_run_with_servers_goes_on_bit_for_bit_and_asks_nothing_twice(directories, tmp_path):
    """The second server fails for a row in four, and would judge all of them when the step is computed again."""
    fails = [True]

    def some(body):
        return [None if fails[0] and row == 0 else len(query) / 7 for row, query in enumerate(body["query"])]

    answer = {"/v1/chat/completions": servers.chat(lambda text: f"Score: {len(text) % 11}"), "/": servers.rewards(some)}
    with servers.serve(lambda handler, *rest: answer[handler.path](handler, *rest)) as server:
        items = (f"judge:{server.url}/v1", f"remote:{server.url}/=0.5")
        cfg = config(directories, tmp_path, rewards=items, steps=2)
        result = grpo.main(cfg)
        first, last = metrics(cfg.directory)
        assert first["frac_reward_failed"] == last["frac_reward_failed"] == 0.25
        asked = len(server.requests)
        fails[0] = False
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
        (tmp_path / "run" / "checkpoints" / "2.sha256.json").unlink()
        assert grpo.main(cfg) == result
        assert metrics(cfg.directory) == [first, last]
        assert len(server.requests) == asked
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    assert list(sample["scores"]) == [items[0], items[1].removesuffix("=0.5")]
    queries = [query for body in server.requests for query in body.get("query", [])]
    assert all(query.startswith("<s>") for query in queries)  # special tokens go along


def test_a_run_stops_where_its_server_fails_and_goes_on_when_it_is_back(directories, tmp_path):
    """Good for the evaluation and the first step; then it fails. In the end the run is one that had no failure."""
    good = servers.rewards(lambda body: [len(query) / 7 for query in body["query"]])
    is_up = [True]

    def answer(handler, body, server):
        is_up[0] = is_up[0] and len(server.requests) != 3
        good(handler, body, server) if is_up[0] else servers.send(handler, "busy", 503)

    with servers.serve(answer) as server:
        options = Reward(server_retries=0)
        cfg = config(directories, tmp_path, rewards=(f"remote:{server.url}",), steps=2, reward=options)
        message = f"remote:{server.url} did not judge 4 of 4 completions: invalid 4; the first: HTTP 503: busy"
        with pytest.raises(RewardError, match=rf"{message}\. Legal: at most 50% of a rollout"):
            grpo.main(cfg)
        assert len(metrics(cfg.directory)) == 1
        server.requests.clear()
        is_up[0] = True
        result = grpo.main(cfg)
        server.requests[:] = [None] * 9
        again = dataclasses.replace(cfg, directory=str(tmp_path / "again"))
        assert grpo.main(again) == result
    assert metrics(again.directory) == metrics(cfg.directory)


@pytest.mark.parametrize("kind", ["outcome", "process"])
def test_a_reward_model_of_the_other_kind_is_refused(kind, directories, tmp_path):
    """Ours say in config.json what they judge; of those of others both are taken."""
    config = hf.read_config(directories / "same", reward_model=True)
    params, head = hf.load(directories / "same", config), hf.load_score_head(directories / "same")
    made = tmp_path / "made"
    hf.save(made, config, params, directories / "same", score_head=head, reward_kind=kind)
    assert hf.reward_kind(made) == kind
    named = {"outcome": str(made), "process": f"process:{made}"}
    other = "outcome" if kind == "process" else "process"
    assert (named[kind] in read_rewards((named[kind],), {}, Reward()).process) == (kind == "process")
    with pytest.raises(ValueError, match=f"{made} is an? {kind} reward model: .*; legal: {named[kind]}$"):
        read_rewards((named[other],), {}, Reward())
    assert hf.reward_kind(directories / "same") is None
    for item in (str(directories / "same"), f"process:{directories / 'same'}"):
        assert read_rewards((item,), {}, Reward()).directories
