"""What waits in the host's memory is used and comes back as if it had stayed."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

from rljax.algorithms import grpo, with_kl
from rljax.models import decoder, lora, policy
from rljax.rollouts.sampler import sample
from rljax.train.mesh import make_mesh, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.update import make_update
from rljax.types import PromptBatch, Sampling, TrainState
from tests import bounds

CONFIG = decoder.DecoderConfig(32, 16, 1, 4, 2, 4, 24, adapter=lora.LoraConfig(rank=2))
OPTIMIZER = optax.adam(1.0, eps=1.0)  # linear in the gradient: rounding stays as small as it is


def stepped(offload):
    """Two updates of an adapter on eight devices: the parameters, and the kinds of memory that the state lies in."""
    base = policy.init(CONFIG, jax.random.key(0))
    params, frozen = policy.with_adapter(base, CONFIG, jax.random.key(1))
    state = TrainState(0, params, OPTIMIZER.init(params), jax.random.key(2), frozen=frozen)
    axes_of = partial(policy.logical_axes, CONFIG)
    shardings = state_shardings(
        make_mesh(2, 2, 2), state, OPTIMIZER, axes_of(params), {n: axes_of(part) for n, part in frozen.items()}, offload
    )
    state = jax.device_put(state, shardings.state)
    algorithm, model, lm = with_kl(grpo(), 0.1), policy.make_policy(CONFIG), decoder.language_model(CONFIG)
    update = make_update(policy_objective(model, algorithm), OPTIMIZER, 1, shardings)
    rows = PromptBatch(np.ones((4, 3), np.int32), np.ones((4, 3), bool), np.arange(4, dtype=np.int32), [{}] * 4, 4)
    traj = sample(lm, state.params, state.frozen, rows, Sampling(n=2, max_tokens=4), 0, 0)
    traj = policy.make_annotate(model, algorithm.needs)(state, traj)
    batch = algorithm.credit(traj.replace(rewards=traj.mask * np.float32(traj.actions % 5)), {})
    for _ in range(2):
        state, _ = update(state, batch)
    kinds = {
        name: {x.sharding.memory_kind for x in jax.tree.leaves(getattr(state, name)) if x.ndim}
        for name in ("params", "opt_state", "frozen")
    }
    return jax.device_get(state.params), kinds


@pytest.mark.nightly
def test_a_state_that_waits_on_the_host_learns_the_same():
    here, kinds = stepped(())
    assert kinds == {"params": {"device"}, "opt_state": {"device"}, "frozen": {"device"}}
    there, kinds = stepped(("opt_state", "frozen"))
    assert kinds == {"params": {"device"}, "opt_state": {"pinned_host"}, "frozen": {"pinned_host"}}
    for mine, other in zip(jax.tree.leaves(there), jax.tree.leaves(here), strict=True):
        rounding = bounds.of_gradient(CONFIG, columns=7, tokens=32, size=np.abs(other).max())
        np.testing.assert_allclose(mine, other, rtol=0, atol=rounding)
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(there))


def test_what_cannot_wait_is_refused():
    state = TrainState(0, {"a": np.zeros(2)}, OPTIMIZER.init({"a": np.zeros(2)}), jax.random.key(0))
    with pytest.raises(ValueError, match=r"offload 'params': legal: \('opt_state', 'frozen'\)"):
        state_shardings(make_mesh(8), state, OPTIMIZER, {"a": (None,)}, offload=("params",))
