"""docs/extending.md: each piece of code on the page runs, is short, and does what the page says."""

import importlib.util
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import tiny
from rljax.models import decoder, families, hf
from rljax.rewards.pool import Pool
from rljax.rewards.score import columns_taken, read_signature
from rljax.rollouts.unroll import draw_noise, reset_envs, unroll

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


@pytest.fixture
def example(tmp_path):
    """The n-th piece of code, as a module of its own."""

    def load(number: int, name: str):
        code = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)[number]
        assert code.count("\n") < 30
        path = tmp_path / f"{name}.py"
        path.write_text(code, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_reward_judges_in_a_worker_process(example, tmp_path, monkeypatch):
    module = example(0, "ascending")
    monkeypatch.setitem(sys.modules, "ascending", module)
    monkeypatch.syspath_prepend(tmp_path)
    cases = [("1, 2 and 5", 3, 1.0), ("1, 5, 2", 3, 0.0), ("1, 2", 3, 0.0), ("2, 2, 3", 3, 0.0), ("x", 0, None)]
    signature = read_signature(module.ascending)
    calls = [((text,), columns_taken("ascending", signature, {"count": n}, "row")) for text, n, _ in cases]
    with Pool(1, 600.0) as pool:
        ((*results,),) = pool.map_each([(module.ascending, calls)])
    assert [result.value for result in results] == [want for *_, want in cases]
    assert results[-1].status == "none"


def test_the_environment_is_a_random_walk_to_the_end(example):
    env = example(1, "corridor").make_corridor(4)

    def act(params, uniforms, observations):
        return jnp.int32(uniforms[:, 0] > 0.5), jnp.zeros(observations.shape[0])

    rows, key = 64, jax.random.key(0)
    _, traj = unroll(env, act, {}, draw_noise(env, key, rows, 200), reset_envs(env, key, rows))
    ends = np.flatnonzero(np.asarray(traj.terminated).ravel())
    lengths = np.diff(ends)[np.diff(ends // 200) == 0]  # of whole episodes: between two ends of one row
    # Steps from cell k to 3, one more than the mean of its neighbors': 12 from cell 0. Their variance is 92.
    assert abs(lengths.mean() - 12) < 5 * np.sqrt(92 / len(lengths))
    assert len(lengths) > 500
    assert np.asarray(traj.rewards == -1).all()
    always_right = lambda params, uniforms, observations: (jnp.ones(rows, int), jnp.zeros(rows))  # noqa: E731
    _, traj = unroll(env, always_right, {}, draw_noise(env, key, rows, 6), reset_envs(env, key, rows))
    np.testing.assert_array_equal(traj.terminated[0], [False, False, True, False, False, True])


def test_the_family_computes_what_transformers_recorded(example, tmp_path, monkeypatch):
    """A Llama with all its biases is a Seed-OSS model too, and transformers has recorded its logits."""
    name = "llama3"
    monkeypatch.setattr(families, "FAMILIES", dict(families.FAMILIES))
    example(2, "seed_oss")
    config = tiny.config_of(name)
    biases = {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True}
    config |= {"model_type": "seed_oss", **biases}
    directory = tiny.write(tmp_path / "model", config, tiny.tensors_of(tiny.config_of(name), tiny.shapes_of(name)))
    decoder_config = hf.read_config(directory)
    params = hf.load(directory, decoder_config)
    recorded = np.load(tiny.RECORDED / "tiny.npz")
    tokens = jnp.asarray(tiny.tokens_of(name)[0])[None]
    segments = jnp.ones_like(tokens)

    @jax.jit
    def forward(params, tokens, positions, segments):
        hidden, _ = decoder.forward(decoder_config, params, tokens, positions, segments, None)
        return decoder.logits(decoder_config, params, hidden)

    logits = forward(params, tokens, jnp.arange(tokens.shape[1])[None], segments)
    np.testing.assert_allclose(logits[0], recorded[f"{name}/0"], rtol=0, atol=2e-5)
