"""Laws that every algorithm obeys, whatever its equation. Where one does not, EXCEPTIONS says why."""

from functools import lru_cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax import algorithms as a
from rljax.algorithms.common.credit import rewards_differ
from rljax.models import policy as models
from rljax.models.decoder import DecoderConfig
from rljax.ops import weights
from rljax.train.mesh import make_mesh, shard_rows, state_shardings
from tests.algorithms.tiny import (
    ALGORITHMS,
    GRADIENT,
    LOGP,
    SUMS,
    T,
    agree,
    asked_for,
    compiled,
    credited,
    kinds_by_day,
    learn,
    rollout,
    state_of,
    table_params,
    table_policy,
    take_rows,
)

EVERY = pytest.mark.parametrize("name", ALGORITHMS)
EVERY_AT_NIGHT = pytest.mark.parametrize("name", kinds_by_day(ALGORITHMS))  # by day one of each kind

RANDOM = "draws a number for each place of the batch, so that other places mean other draws"
PULL = "pulls the policy towards another one, or towards its data, without any advantage"
EXCEPTIONS = {
    "row order": {"clip_cov": RANDOM, "all at once": RANDOM},
    "packing": {"clip_cov": RANDOM, "all at once": RANDOM, "real": "compares the rows of a group in `prepare`"},
    "absent rows": {"clip_cov": RANDOM, "all at once": RANDOM},
    "zero advantage": {
        **dict.fromkeys(
            (
                "sft",
                "dft",
                "dro",
                "opmd",
                "opmd + group length",
                "kl_cov",
                "ppo_penalty",
                "a_star_po",
                "vapo + positive nll",
                "all at once",
            ),
            PULL,
        ),
        "nash_md": PULL,
        **{name: PULL for name in ALGORITHMS if "+ kl" in name or "entropy" in name or "importance-weighted" in name},
        "rloo + kl in reward": None,
        "dapo + high entropy mask": None,
    },
    "on-policy gradient": {
        "a_star_po": "is a regression, not a policy gradient",
        "dft": "weighs each token by its probability",
        "real": "is a classification, not a policy gradient",
        "clip_cov": "holds some tokens back",
        "kl_cov": "|log π - log π_old| has no slope at 0: rounding decides its sign",
        "dapo + high entropy mask": "holds some tokens back",
        "all at once": "holds some tokens back",
        "vapo + positive nll": PULL,
    },
}


def except_for(law, by_day=list):
    """Every algorithm but those that break the law for a written reason; `by_day`: which of them not only at night."""
    broken = {name for name, why in EXCEPTIONS[law].items() if why}
    assert broken <= set(ALGORITHMS)
    return pytest.mark.parametrize("name", by_day(name for name in ALGORITHMS if name not in broken))


@lru_cache
def credited_rollout(name):
    """The batch of the rollout as it is."""
    return credited(ALGORITHMS[name], rollout())


@lru_cache
def undisturbed(name):
    """Its gradient and metrics: what most laws compare with."""
    return learn(ALGORITHMS[name], credited_rollout(name), table_params())


@EVERY_AT_NIGHT
def test_micro_batches_change_neither_gradient_nor_metrics(name):
    assert np.abs(undisturbed(name)[0]["table"]).max() > 1e-3
    found = learn(ALGORITHMS[name], credited_rollout(name), table_params(), micro_batches=2)
    agree(found, undisturbed(name))


DECODER = DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4, intermediate_size=16
)


def on_a_mesh(algorithm, traj, params, shardings, policy, micro_batches):
    """Gradient and metrics of a real update."""
    credit, update = compiled(algorithm, params, shardings, policy, micro_batches)
    traj = asked_for(algorithm, traj)
    batch = credit(traj if shardings is None else shard_rows(shardings, traj), {})
    state = state_of(params) if shardings is None else jax.device_put(state_of(params), shardings.state)
    state, metrics = update(state, batch)
    return jax.device_get((state.opt_state[0].trace, metrics))


def decoder(mesh_sizes):
    """A decoder with a value head and its shardings on a mesh of 8 devices; None: one device."""
    params = models.with_value_head(models.init(DECODER, jax.random.key(1)), DECODER)
    params["value_head"] = jnp.linspace(-1, 1, DECODER.hidden_size)
    if mesh_sizes is None:
        return params, None
    axes = models.logical_axes(DECODER, params)
    return params, state_shardings(make_mesh(*mesh_sizes), state_of(params), GRADIENT, axes)


def of_decoder(mesh_sizes, micro_batches):
    params, shardings = decoder(mesh_sizes)
    policy, algorithm = models.make_policy(DECODER), ALGORITHMS["ppo + kl + entropy"]
    return on_a_mesh(algorithm, rollout(vocabulary=16), params, shardings, policy, micro_batches)


@pytest.fixture(scope="module")
def on_one_device():
    return of_decoder(None, 1)


MESHES = {(8, 1, 1): 1, (1, 2, 4): 1, (2, 2, 2): 2}  # each axis alone or with another, and all of them
MORE_MESHES = {(1, 8, 1): 2, (4, 2, 1): 1, (2, 4, 1): 2}


@pytest.mark.parametrize(
    ("sizes", "micro_batches"),
    [*MESHES.items(), *(pytest.param(*case, marks=pytest.mark.nightly) for case in MORE_MESHES.items())],
    ids=lambda s: str(s).replace(", ", "x"),
)
def test_a_mesh_changes_neither_gradient_nor_metrics(on_one_device, sizes, micro_batches):
    agree(of_decoder(sizes, micro_batches), on_one_device)


# By day a few that read different facts: each compiles two programs for eight devices.
BY_DAY = {
    "reinforce",
    "remax",
    "grpo",
    "gspo",
    "gdpo",
    "clip_cov",
    "vtrace",
    "ppo + kl + entropy",
    "grpo + tis by sequence",
    "grpo + filter groups",
}
assert set(ALGORITHMS) >= BY_DAY


@pytest.mark.parametrize(
    "name", [name if name in BY_DAY else pytest.param(name, marks=pytest.mark.nightly) for name in ALGORITHMS]
)
def test_compiled_on_a_mesh_in_micro_batches_it_is_the_same_and_traced_once(name):
    """Against the same computation operation by operation on one device."""
    algorithm, axes = ALGORITHMS[name], {"table": ("embed", "mlp"), "values": (None,)}
    shardings = state_shardings(make_mesh(2, 2, 2), state_of(table_params()), GRADIENT, axes)
    traces = []

    def traced(f):
        return lambda *args: traces.append(f) or f(*args)

    seen = algorithm._replace(credit=traced(algorithm.credit), loss=traced(algorithm.loss))
    credit, update = compiled(seen, table_params(), shardings, micro_batches=2)
    state = jax.device_put(state_of(table_params()), shardings.state)
    for step in range(2):
        traj = asked_for(algorithm, rollout(seed=step))
        coefficients = {"kl": jnp.float32(0.1 + step), "entropy": jnp.float32(0.5 - 0.1 * step)}
        batch = credit(shard_rows(shardings, traj), coefficients)
        if step == 0:
            want = learn(algorithm, algorithm.credit(traj, coefficients), table_params())
        state, metrics = update(state, batch)
        if step == 0:
            got = jax.device_get((state.opt_state[0].trace, metrics))
            sided = (
                "clip_fraction_low",
                "clip_fraction_high",
            )  # GDPO's row alone has Â = 0 ± rounding: its side is none
            shown = {k: v for k, v in got[1].items() if k not in sided}
            agree((got[0], shown), (want[0], {k: v for k, v in (want[1] | norms(got)).items() if k in shown}))
            once = len(traces)
        state = state.replace(step=step + 1, cursor=7 * step)
    assert len(traces) == once


def norms(found):
    """The metrics that only an optimizer step has; at a learning rate of 1 they are the same."""
    norm = np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(found[0])))
    return {"grad_norm": norm, "update_norm": norm}


def spoil(x, mask):
    """Every [B T] fact with garbage wherever the mask is False: NaN and 1e30 by turns, as a comparison skips NaN."""
    facts = {}
    for name, value in vars(x).items():
        if name in ("mask", "traj", "inputs", "actions", "positions", "segments", "scores") or np.ndim(value) != 2:
            continue
        keep = np.pad(mask, ((0, 0), (0, value.shape[1] - mask.shape[1])), constant_values=True)
        garbage = np.where(np.indices(value.shape).sum(axis=0) % 2, np.float32(1e30), np.float32(np.nan))
        if np.issubdtype(value.dtype, np.integer):
            value = np.asarray(value, np.float32)
        facts[name] = jnp.asarray(np.where(keep, value, True if value.dtype == bool else garbage))
    return x.replace(**facts)


@EVERY
def test_what_stands_at_masked_columns_changes_nothing(name):
    algorithm, traj = ALGORITHMS[name], rollout()
    batch = credited(algorithm, spoil(traj, traj.mask))
    batch = spoil(batch.replace(traj=spoil(batch.traj, batch.mask)), batch.mask)
    assert np.isnan(batch.advantages).any()
    assert (batch.advantages == 1e30).any()
    chex.assert_trees_all_equal(learn(algorithm, batch, table_params()), undisturbed(name))


@EVERY
def test_what_the_policy_says_of_masked_columns_changes_nothing(name):
    """As of padding, where attention sees nothing. Garbage is added, so that a careless mask would pass it back."""

    def careless(params, frozen, traj):
        garbage = jnp.where(traj.mask, 0.0, jnp.nan)
        return jax.tree.map(lambda x: x + garbage, table_policy(params, frozen, traj))

    agree(learn(ALGORITHMS[name], credited_rollout(name), table_params(), careless), undisturbed(name))


@except_for("row order")
def test_row_order_and_the_names_of_groups_do_not_matter(name):
    algorithm, traj, order = ALGORITHMS[name], rollout(), np.random.default_rng(0).permutation(16)
    straight = credited_rollout(name)
    other = take_rows(traj, order)
    mixed = credited(algorithm, other.replace(group=1000 - 3 * other.group))
    agree(mixed.advantages, straight.advantages[order])
    agree(learn(algorithm, mixed, table_params()), undisturbed(name))


def own_gradient(weight, batch, table, entropy_coefficient):
    """Σ w Â (p - onehot)/τ, in float64, less c times the gradient of the entropy."""
    weight = np.float64(weight(batch.mask, batch.traj.segments, batch.traj.group))
    state, action, tau = (np.asarray(x) for x in (batch.traj.inputs, batch.traj.actions, batch.traj.temperature))
    want = np.zeros_like(table)
    for b, t in zip(*np.nonzero(batch.mask), strict=True):
        z = table[state[b, t]] / tau[b, t]
        p = np.exp(z) / np.exp(z).sum()
        by_logits = np.float64(batch.advantages[b, t]) * (p - np.eye(len(p))[action[b, t]])
        by_logits += entropy_coefficient * p * (np.log(p) - (p * np.log(p)).sum())
        want[state[b, t]] += weight[b, t] * by_logits / tau[b, t]
    return want


def on_policy(traj):
    """As if the policy had drawn it, and were its own reference."""
    logp = table_policy(table_params(), {}, traj).logp
    return traj.replace(logp=logp, old_logp=logp, ref_logp=logp)


@except_for("on-policy gradient")
def test_on_policy_the_gradient_is_the_policy_gradient_of_its_own_advantages(name):
    """With the reference equal to the policy too, so that the KL term has no slope."""
    algorithm = ALGORITHMS[name]
    batch = credited(algorithm, on_policy(rollout()))
    gradient, metrics = learn(algorithm, batch, table_params())
    # rloo's terms are one ratio of the whole answer on each of its tokens: its gradient is the sum over them
    weight = weights.seq_mean_token_sum if name.startswith("rloo") else algorithm.weights
    want = own_gradient(weight, batch, np.float64(table_params()["table"]), 0.2 if "entropy" in name else 0.0)
    agree(gradient["table"], want)
    np.testing.assert_allclose(metrics["ratio"], 1.0, rtol=T * LOGP)
    assert metrics["logp_diff_max"] < LOGP


@except_for("zero advantage")
def test_without_advantage_the_policy_does_not_move(name):
    algorithm = ALGORITHMS[name]
    batch = credited_rollout(name)
    gradient, _ = learn(algorithm, batch.replace(advantages=jnp.zeros_like(batch.advantages)), table_params())
    assert not gradient["table"].any()


# Wrappers that change rewards or advantages: by length, or towards another policy.
SHAPED = [name for name in ALGORITHMS if any(word in name for word in ("length", "overlong", "in reward", "teacher"))]
COMPARES = [  # completions of one prompt with one another, and nothing else
    name for name, algorithm in ALGORITHMS.items() if algorithm.group_signal is rewards_differ and name not in SHAPED
]


@pytest.mark.parametrize("name", COMPARES)
@pytest.mark.parametrize("reward", [0.1, *(pytest.param(x, marks=pytest.mark.nightly) for x in (1.0, 1 / 3, -1000.1))])
def test_equal_rewards_are_no_signal_to_the_last_bit(name, reward):
    """But to rounding where the mean is weighted."""
    traj = rollout()
    lone = (traj.group == 2)[:, None]  # a group of one has nothing to compare with
    last = traj.terminated | traj.truncated
    rewards = jnp.where(last & traj.mask & ~lone, jnp.float32(reward), 0.0)
    advantages = credited(ALGORITHMS[name], traj.replace(rewards=rewards)).advantages
    limit = SUMS * abs(reward) if name in ("opo", "otb") else 0.0
    mates = (traj.group[:, None] == traj.group[None, :]).astype(int) @ traj.mask.astype(int)
    alone = (mates == 1) & (name == "otb")  # in its column: no baseline there
    assert np.abs(np.where(alone, 0.0, advantages)).max() <= limit


@except_for("absent rows", kinds_by_day)
def test_rows_without_decisions_or_judgement_are_as_if_they_were_not_there(name):
    algorithm, traj = ALGORITHMS[name], rollout()
    gone = [3] if name in ("sft", "dft") else [3, 7]  # a demonstration needs no judgement
    kept = take_rows(traj, np.delete(np.arange(len(traj.mask)), gone))
    whole, less = credited_rollout(name), credited(algorithm, kept)
    agree(np.delete(whole.advantages, gone, axis=0), less.advantages)
    agree(undisturbed(name), learn(algorithm, less, table_params()))


def packed(batch):
    """The batch with rows i and i + 8 one behind the other in one row, as segments 1 and 2."""
    half = len(batch.mask) // 2

    def join(x):
        x = np.asarray(x)
        return jnp.asarray(np.concatenate([x[:half], x[half:]], axis=1))

    traj = batch.traj
    facts = {name: join(x) for name, x in vars(traj).items() if x is not None and x.shape == traj.mask.shape}
    facts["segments"] = join(np.where(traj.segments > 0, traj.segments + np.arange(2).repeat(half)[:, None], 0))
    if traj.values is not None:
        facts["values"] = jnp.pad(join(np.asarray(traj.values)[:, :-1]), ((0, 0), (0, 1)))
    facts["group"] = join(np.broadcast_to(np.asarray(traj.group)[:, None], traj.mask.shape))
    facts |= dict.fromkeys(("scores", "baseline"))
    own = {name: getattr(batch, name) for name in ("advantages", "mask", "returns")}
    own = {name: join(x) for name, x in own.items() if x is not None}
    return batch.replace(traj=traj.replace(**facts), extra=jax.tree.map(join, batch.extra), **own)


@except_for("packing", kinds_by_day)
def test_packed_rows_give_the_same_gradient(name):
    agree(learn(ALGORITHMS[name], packed(credited_rollout(name)), table_params()), undisturbed(name))


@pytest.mark.parametrize("correct", [a.truncate_is, a.mask_is, a.off_policy_sequence_mask, a.high_entropy_mask])
def test_corrections_touch_neither_the_critic_nor_the_kl_in_any_order(correct):
    traj, params = rollout(), table_params()

    def gradient(algorithm):
        return learn(algorithm, credited(algorithm, traj), params)[0]

    inside, outside = a.with_kl(correct(a.ppo()), 0.3), correct(a.with_kl(a.ppo(), 0.3))
    agree(gradient(inside), gradient(outside))
    plain = gradient(a.with_kl(a.ppo(), 0.3))
    agree(gradient(inside)["values"], plain["values"])
    assert np.abs(gradient(inside)["table"] - plain["table"]).max() > 1e-4


@EVERY_AT_NIGHT
def test_a_batch_of_nothing_gives_no_gradient_and_no_nan(name):
    algorithm, traj = ALGORITHMS[name], rollout()
    gradient, metrics = learn(algorithm, credited(algorithm, traj.replace(mask=traj.mask & False)), table_params())
    assert not any(x.any() for x in gradient.values())
    assert metrics["loss"] == 0


def test_rows_are_spread_over_the_mesh_and_scalars_copied():
    _, shardings = decoder((2, 2, 2))
    batch = shard_rows(shardings, credited(ALGORITHMS["ppo"], rollout()).replace(coefficients={"kl": jnp.float32(0)}))
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(batch) if leaf.ndim} == {4}
    assert batch.coefficients["kl"].sharding.is_fully_replicated
