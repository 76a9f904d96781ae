"""Losses and gradients of every objective are those of one device, on every mesh: dense, adapter and mixture.

Every algorithm of `tests/algorithms/tiny.py` is differentiated by the log-probs, entropies and values of one forward
pass of a decoder, and all of these together by its parameters: one program a mesh. Objectives with batches of their own
(preferences, reward models, distillation) are one program too, each with its own passes.

`python -m tests.test_sharding_laws` prints the largest difference of each mesh, model and kind of batch.
"""

import dataclasses
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax import algorithms as a
from rljax.algorithms.dpo import mean_log_ratio
from rljax.models import heads
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.models.distillation import make_compare
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig
from rljax.ops import preferences
from rljax.train.mesh import hidden_sharding, make_mesh, shard_rows, state_shardings
from rljax.train.objective import policy_objective
from rljax.types import TrainState
from tests.algorithms import test_preferences as cases
from tests.algorithms.tiny import ALGORITHMS, credited, rollout
from tests.test_laws import packed

MESHES = {
    "data 8": {"data": 8, "fsdp": 1},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "all but data": {"fsdp": 1, "sequence": 2, "expert": 2, "tensor": 2},
    "2 x 4": {"data": 2, "fsdp": 4},
    "4 x 2": {"data": 4, "fsdp": 2},
    "fsdp 2, sequence 4": {"fsdp": 2, "sequence": 4},  # 6 columns over 4 devices
    "fsdp 4, expert 2": {"fsdp": 4, "expert": 2},
}
DENSE = DecoderConfig(16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16)
MODELS = {
    "dense": DENSE,
    "adapter": dataclasses.replace(DENSE, adapter=LoraConfig(rank=2)),
    "mixture": dataclasses.replace(DENSE, num_layers=2, moe=MoEConfig(4, 2, 8, layers=(1,), norm_topk_prob=True)),
}
UNPACKABLE = {name for name, algorithm in ALGORITHMS.items() if algorithm.whole_groups}
TOLERANCE = 1e-5  # of the gradient's norm


# ----------------------------------------------------------------------------------------------------- the two programs


def parameters(config):
    """(trained, frozen), at random, also where they begin as zeros."""
    params = models.init(config, jax.random.key(1))
    params["value_head"] = jnp.linspace(-1, 1, config.hidden_size)
    params["score_head"] = jnp.linspace(1, -0.5, config.hidden_size)
    frozen = {"reference": {}}
    if config.adapter is not None:
        params, frozen = models.with_adapter(params, config, jax.random.key(2))
        keys = iter(jax.random.split(jax.random.key(3), 100))
        # With 0.3 the gradient of one device was 1.2e-5 of its norm away from float64's, with 0.1 it is 7e-7.
        params["lora"] = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(keys), x.shape), params["lora"])
    return params, {**frozen, "teacher": models.init(dataclasses.replace(config, adapter=None), jax.random.key(4))}


def of_algorithms(config, batches):
    """f(params, frozen, batches) -> {name: (loss, gradient)} of every algorithm, from one forward pass."""
    policy = models.make_policy(config)

    def differentiate(params, frozen, batches):
        traj = next(iter(batches.values())).traj
        output, pull_back = jax.vjp(lambda params: policy(params, frozen, traj), params)
        losses = {}
        slopes = {}
        for name, batch in batches.items():
            objective = policy_objective(lambda output, frozen, traj: output, ALGORITHMS[name])
            batch = objective.prepare(output, {}, batch, jax.random.key(7))
            losses[name], slopes[name] = jax.value_and_grad(lambda x, o=objective, b=batch: o.loss(x, {}, b)[0])(output)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *slopes.values())
        (gradients,) = jax.lax.map(pull_back, stacked)
        return losses, gradients

    losses, gradients = jax.device_get(jax.jit(differentiate)(*batches))
    return {name: (loss, jax.tree.map(lambda x, i=i: x[i], gradients)) for i, (name, loss) in enumerate(losses.items())}


def objectives(config):
    """{name: (objective, its batch)}: every function that makes an objective of its own."""
    policy = models.make_policy(config)
    score = heads.make_reward_model(config)
    compare = make_compare(config, dataclasses.replace(config, adapter=None))
    pairs = {
        "dpo": a.dpo(policy, beta=0.5),
        "ipo": a.dpo(policy, preferences.ipo, measure=mean_log_ratio),
        "aot": a.aot(policy, 0.5, 0.1),
        "aot_unpaired": a.aot_unpaired(policy, 0.5, 0.1),
        "cpo": a.cpo(policy),
        "simpo": a.simpo(policy),
        "orpo": a.orpo(policy),
        "dpop": a.dpop(policy, 0.5, 2.0),
        "step_dpo": a.step_dpo(policy),
    }
    unpaired = {"kto": a.kto(policy, 0.5), "bco": a.bco(policy, 0.5), "implicit_prm": a.implicit_prm(policy, 0.5)}
    distilled = {"gkd": a.gkd(compare, 0.3), "minillm": a.minillm(compare)}
    return {
        **{name: (objective, cases.pairs()) for name, objective in pairs.items()},
        **{name: (objective, cases.judged()) for name, objective in unpaired.items()},
        **{name: (objective, cases.taught()) for name, objective in distilled.items()},
        "odpo": (a.odpo(policy, 0.5, 0.7), cases.rated()),
        "xpo": (a.xpo(policy, beta=0.5, alpha=0.1), cases.explored()),
        "tpo": (a.tpo(policy, 0.5, 0.3), cases.triples()),
        "sdft": (a.sdft(compare), cases.shown()),
        "reward_model": (a.reward_model(score, center_rewards_coefficient=0.01), cases.rated()),
        "ranked_reward_model": (a.ranked_reward_model(score), cases.rankings()),
        "process_reward_model": (a.process_reward_model(heads.make_process_reward_model(config)), cases.steps()),
    }


def of_objectives(config, arguments):
    """{name: (loss, gradient)} of every objective that is no algorithm."""
    made = {name: objective for name, (objective, _) in objectives(config).items()}

    def differentiate(params, frozen, batches):
        found = {}
        for name, batch in batches.items():
            objective = made[name]
            batch = objective.prepare(params, frozen, batch, jax.random.key(7))
            found[name] = jax.value_and_grad(lambda p, o=objective, b=batch: o.loss(p, frozen, b)[0])(params)
        return found

    return jax.device_get(jax.jit(differentiate)(*arguments))


@cache
def batches_of(kind, only=""):
    """The batches of a program: "rows" or "packed" of the algorithms, "objectives" of the rest; all of them, or one."""
    if kind == "objectives":
        batches = {name: batch for name, (_, batch) in objectives(DENSE).items()}
        return {only: batches[only]} if only else batches
    names = [only] if only else ALGORITHMS
    rows = {name: credited(ALGORITHMS[name], rollout(vocabulary=16)) for name in names}
    if kind == "rows":
        return rows
    return {name: packed(batch) for name, batch in rows.items() if name not in UNPACKABLE}


def losses_and_gradients(model, kind, mesh=None, only=""):
    """{name: (loss, gradient)} on a mesh; None: on one device."""
    config = MODELS[model]
    params, frozen = parameters(config)
    arguments = (params, frozen, batches_of(kind, only))
    if mesh is not None:
        config = dataclasses.replace(config, hidden_sharding=hidden_sharding(mesh))
        frozen_axes = {name: models.logical_axes(config, part) for name, part in frozen.items()}
        state = TrainState(0, params, optax.EmptyState(), jax.random.key(0), frozen=frozen)
        axes = models.logical_axes(config, params)
        shardings = state_shardings(mesh, state, optax.identity(), axes, frozen_axes)
        state = jax.device_put(state, shardings.state)
        arguments = (state.params, state.frozen, shard_rows(shardings, batches_of(kind, only)))
    return (of_objectives if kind == "objectives" else of_algorithms)(config, arguments)


@cache
def on_one_device(model, kind, only):
    return losses_and_gradients(model, kind, only=only)


def differences(model, kind, sizes, only=""):
    """{name: the larger difference of loss and gradient, in units of the gradient's norm on one device}."""
    want = on_one_device(model, kind, only)
    got = losses_and_gradients(model, kind, make_mesh(**sizes), only)
    found = {}
    for name, (loss, gradient) in want.items():
        norm = optax.tree.norm(jax.tree.map(np.float64, gradient))
        apart = optax.tree.norm(jax.tree.map(lambda x, y: np.float64(x) - np.float64(y), got[name][1], gradient))
        found[name] = float(max(apart, abs(np.float64(got[name][0]) - loss)) / norm)
    assert all(map(np.isfinite, found.values()))
    return found


# ---------------------------------------------------------------------------------------------------------------- laws

KINDS = ("rows", "packed", "objectives")
PRODUCT = [(mesh, model, kind) for model in MODELS for kind in KINDS for mesh in MESHES]
ONE_EACH = [  # every mesh, model, kind of batch and kind of method, but not each with each
    ("data 8", "adapter", "rows", "ppo + kl + entropy"),
    ("2 x 2 x 2", "mixture", "packed", "gspo"),
    ("all but data", "mixture", "objectives", "dpo"),
    ("2 x 4", "dense", "packed", "vtrace"),
    ("4 x 2", "adapter", "objectives", "reward_model"),
    ("fsdp 2, sequence 4", "dense", "rows", "grpo + kl"),
    ("fsdp 4, expert 2", "mixture", "rows", "clip_cov"),
]


@pytest.mark.parametrize(("mesh", "model", "kind", "name"), ONE_EACH)
def test_a_mesh_changes_neither_loss_nor_gradient(mesh, model, kind, name):
    assert differences(model, kind, MESHES[mesh], name)[name] < TOLERANCE


@pytest.mark.nightly
@pytest.mark.parametrize(("mesh", "model", "kind"), PRODUCT)
def test_a_mesh_changes_neither_losses_nor_gradients(mesh, model, kind):
    found = differences(model, kind, MESHES[mesh])
    name = max(found, key=found.get)
    print(f"{mesh}, {model}, {kind}: {len(found)} objectives, largest difference {found[name]:.1e} ({name})")
    assert found[name] < TOLERANCE, name


def main(names):
    """A line for each case, and the largest difference of all. `names`: of the models; none: all."""
    worst = (0.0, "")
    for mesh, model, kind in PRODUCT:
        if names and model not in names:
            continue
        found = differences(model, kind, MESHES[mesh])
        jax.clear_caches()
        name = max(found, key=found.get)
        print(f"{mesh:20} {model:8} {kind:10} {len(found):3} objectives {found[name]:.2e} {name}", flush=True)
        worst = max(worst, (found[name], f"{mesh}, {model}, {kind}, {name}"))
    print("largest", worst)


if __name__ == "__main__":
    main(sys.argv[1:])
