"""grpo.py with its completions from a server process: the run without one, and an error for each way it can fail."""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import grpo
from experiments.common import controllers, models, remote_sampling, train
from experiments.common.algorithms import critic_free
from experiments.common.settings import Batches, Controllers, MeshShape, Sampling, Server
from experiments.tools import tiny_model
from rewards import hostile, servers
from rljax import types
from rljax.data.tokenizer import load_tokenizer
from rljax.models.decoder import DecoderConfig
from rljax.models.policy import make_policy
from rljax.train.mesh import make_mesh
from rljax.types import PromptBatch, TrainState
from test_grpo_experiment import metrics, write_prompts

ROOT = Path(__file__).resolve().parents[1]
VERIFIERS = {"share": hostile.share_of}
ROWS = [{"prompt": "once upon"[: 3 + i], "letters": "abcdefghijklm"} for i in range(6)]
SEED = 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("remote")
    for name, seed in {"tiny": 0, "other": 1}.items():
        tiny_model.main(tiny_model.Config(str(root / name), width=32, layers=1, context=64, seed=seed))
    return root


@pytest.fixture(scope="module")
def url(folder):
    """Of a server process, which has other weights than the run begins with."""
    command = [sys.executable, "experiments/serve.py", "--model", str(folder / "other"), "--port", "0"]
    command += ["--seed", str(SEED), "--rows", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield re.search(r"http://\S+/v1", next(line for line in process.stdout if "http://" in line))[0]
        finally:
            process.kill()


@pytest.fixture
def settings(folder, tmp_path) -> grpo.Config:
    return grpo.Config(
        model=str(folder / "tiny"),
        prompts=write_prompts(folder / "prompts.jsonl", ROWS),
        rewards=("share",),
        seed=SEED,
        steps=2,
        batches=Batches(prompts=2, num_generations=2),
        sampling=Sampling(max_tokens=8),
        eval_prompts=2,
        eval_samples=2,
        directory=str(tmp_path / "run"),
        mesh=MeshShape(fsdp=1, tensor=-1),  # two prompts, eight devices
    )


@pytest.fixture
def connected(settings, url):
    """(the sample function of a server that takes the weights, a state, prompts), by a log-ratio."""
    config, params, frozen = models.load_pretrained(settings.model, settings.weights, make_mesh(), 32, SEED)
    state = TrainState(0, params, None, jax.random.key(SEED), frozen=frozen)
    tokens = np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    prompts = PromptBatch(tokens, np.ones_like(tokens, bool), np.arange(2, dtype=np.int32), [{}, {}], 0)
    sampling = types.Sampling(n=2, max_tokens=8, stop=load_tokenizer(settings.model).stop)
    policy = jax.jit(make_policy(config))
    served = dataclasses.replace(settings, server=Server(url))

    def sample(added: float, step: int):
        asked = []

        def token_columns(state, traj):
            asked.append(traj)
            found = policy(state.params, state.frozen, traj).logp - traj.logp
            return {"log_ratio": jnp.where(traj.mask, found, 99.0).at[1, 2].add(added)}

        connection = remote_sampling.connect_server(served, config, token_columns)
        trajs = [connection(state, step + k, prompts, sampling) for k in range(3)]
        assert len(asked) == remote_sampling.CHECKED_STEPS
        return trajs

    return sample


def test_pushed_weights_sample_and_their_log_probs_are_compared(connected, url, folder, monkeypatch):
    """Where tokens were chosen, by the given log-ratio, in the first steps; other weights are found out."""
    for k, traj in enumerate(connected(0.0, 5)):
        np.testing.assert_array_equal(np.unique(traj.version[traj.mask]), [5 + k])
    with pytest.raises(RuntimeError, match=r"differ by up to 0.25 nats"):
        connected(-0.25, 5)
    request_json = remote_sampling.request_json

    def push_others(state, config, source, url, version):
        """Another model's weights, which the server takes for those of the step."""
        body = {"model_path": str(folder / "other"), "weight_version": version}
        request_json(f"{url.removesuffix('/v1')}/update_weights_from_disk", body, 600.0)

    monkeypatch.setattr(remote_sampling, "push_weights", push_others)
    with pytest.raises(RuntimeError, match=r"differ by up to \S+ nats: another model, other weights"):
        connected(0.0, 0)
    monkeypatch.setattr(remote_sampling, "push_weights", lambda *_: None)  # a server that says yes and keeps its own
    push_others(None, None, None, url, "41")
    with pytest.raises(ValueError, match=r"answered with version 41 of the weights, the trainer's is \w+:0"):
        connected(0.0, 0)


def test_long_answers_are_read():
    """What the ids, log-probs and texts of all completions may take as JSON is expected of them."""
    body = {"prompt": [0] * 1000, "n": 64, "max_tokens": 4000}
    token = json.dumps({"id": 150_000, "text": "\U0001f600" * 8, "logprob": -1.2345678901234567e-05, "offset": 15_000})
    assert remote_sampling.answer_bytes(body) > 64 * (1000 * len("150000, ") + 4000 * 3 * len(token))
    with servers.serve(servers.text(json.dumps("x" * 2**24))) as server:
        assert len(remote_sampling.ask_server(server.url, [body])[0]) == 2**24


@pytest.mark.parametrize("name", sorted(critic_free(8)))
def test_what_another_policy_sampled_is_corrected_for_or_refused(name):
    algorithm = critic_free(8)[name]()
    config = DecoderConfig(8, 8, 1, num_heads=1, num_kv_heads=1, head_dim=8, intermediate_size=8)
    sizes = Batches(num_generations=8)
    if name in ("otb", "real"):
        legal = r"legal: --server.weights push to a server in float32, or another algorithm$"
        with pytest.raises(ValueError, match=f"{name} is right for samples of its own policy alone, .*{legal}"):
            train.check_algorithm(algorithm, sizes, name, other=True)
        with pytest.raises(ValueError, match="carry_over = 2 goes on with those of older ones; legal: 0"):
            train.check_algorithm(algorithm, dataclasses.replace(sizes, carry_over=2), name)
        return
    train.check_algorithm(algorithm, dataclasses.replace(sizes, carry_over=2), name, other=True)
    half = dataclasses.replace(config, dtype="bfloat16")
    for corrected in (
        train.with_own_old_logp(algorithm, config, other=True),
        train.with_own_old_logp(algorithm, config, carry_over=2),
        train.with_own_old_logp(algorithm, half, carry_over=2),
    ):
        assert (corrected is algorithm) == (name == "topr")  # which divides by the sampler's probabilities itself
        assert ("old_logp" in corrected.needs) == (name != "topr")
        assert train.with_own_old_logp(corrected, config, other=True) is corrected
    assert train.with_own_old_logp(algorithm, config) is algorithm


def test_the_kl_of_a_server_of_its_own_weights_is_no_target():
    """It stays where it is, however far the trained policy goes."""
    target = Controllers(kl_target=6.0)
    with pytest.raises(
        ValueError, match=r"kl_target = 6.0 follows the KL of the policy that samples.*; legal: --server"
    ):
        controllers.check_target(target, Server("http://h/v1", weights="keep"))
    controllers.check_target(target, Server("http://h/v1"))
    controllers.check_target(Controllers(), Server("http://h/v1", weights="keep"))
    controllers.check_target(target, Server())


@pytest.mark.nightly
def test_a_run_learns_from_a_server_what_it_learns_alone(settings, url, tmp_path):
    grpo.main(settings, verifiers=VERIFIERS)
    remote = dataclasses.replace(settings, server=Server(url), directory=str(tmp_path / "remote"))
    grpo.main(remote, verifiers=VERIFIERS)
    alone, served = metrics(settings.directory), metrics(remote.directory)
    assert len(alone) == len(served) == 2
    for step in range(2):
        for name in ("reward", "length", "kl_sequence", "loss", "grad_norm"):
            assert served[step][name] == pytest.approx(alone[step][name], rel=1e-3, abs=1e-5)
        assert served[step]["sampler_gap"] < 1e-4


def test_a_server_with_weights_of_its_own_is_corrected_for(settings, url):
    kept = dataclasses.replace(settings, algorithm="reinforce", steps=1, server=Server(url, weights="keep"))
    grpo.main(kept, verifiers=VERIFIERS)
    (found,) = metrics(settings.directory)
    assert "sampler_weight" in found  # π_old / π_sampler, truncated


def test_what_goes_wrong_is_one_error_each(settings, url, tmp_path):
    directories = (str(tmp_path / f"run{number}") for number in itertools.count())

    def complain(**change) -> str:
        changed = dataclasses.replace(settings, directory=next(directories), **change)
        with pytest.raises((ValueError, RuntimeError)) as caught:
            grpo.main(changed, verifiers=VERIFIERS)
        return str(caught.value)

    assert complain(server=Server("localhost:80")).startswith("'localhost:80' is no address of a server; legal: http")
    assert complain(server=Server("http://127.0.0.1:9/v1")).startswith("no server at http://127.0.0.1:9/v1")
    assert "does not list its models" in complain(server=Server(url.removesuffix("/v1")))
    batches = dataclasses.replace(settings.batches, carry_over=1)
    assert "a server's completions are not resumed" in complain(server=Server(url), batches=batches)
    sampling = dataclasses.replace(settings.sampling, top_p=0.5)
    assert "legal with a server: temperature, n and max_tokens" in complain(server=Server(url), sampling=sampling)
