"""Laws of every objective over compared or judged answers, and what is peculiar to each."""

import json
from functools import lru_cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rljax.algorithms.aot import aot, aot_unpaired
from rljax.algorithms.bco import bco, initial_state
from rljax.algorithms.common.pairs import CompletionStats, preference_objective
from rljax.algorithms.cpo import cpo, simpo
from rljax.algorithms.dpo import chosen_nll, dpo, f_divergence, ld_dpo_weights, mean_log_ratio, preference_term, wpo
from rljax.algorithms.dpop import dpop
from rljax.algorithms.gkd import gkd
from rljax.algorithms.kto import balanced_class_weights, fixed_class_weights, kto
from rljax.algorithms.minillm import minillm
from rljax.algorithms.odpo import odpo
from rljax.algorithms.online_dpo import online_pairs
from rljax.algorithms.orpo import orpo
from rljax.algorithms.prime import implicit_prm
from rljax.algorithms.process_reward_model import process_reward_model
from rljax.algorithms.reward_model import ranked_reward_model, reward_model
from rljax.algorithms.sdft import sdft
from rljax.algorithms.sdpo import sdpo
from rljax.algorithms.sft import dft, sft
from rljax.algorithms.step_dpo import step_dpo
from rljax.algorithms.tpo import tpo, tpo_l
from rljax.algorithms.xpo import xpo, xpo_pairs
from rljax.ops import preferences, ranking
from rljax.ops.distillation import TokenComparison, columns_of_same_decisions, sampled_token, top_k
from rljax.ops.logprobs import chosen_logp
from rljax.train.mesh import make_mesh, state_shardings
from rljax.train.objective import policy_objective
from rljax.train.update import learn as learn_in_minibatches
from rljax.train.update import make_update
from rljax.types import Distillation, Pairs, Trajectory, Unpaired, trajectory_of_tokens
from tests import test_golden
from tests.algorithms.tiny import GRADIENT, T, V, agree, rollout, state_of, table_params, table_policy, take_rows
from tests.golden.preferences import TABLE, one_token, reads_logp


def policy(params, frozen, traj):
    """`table_policy`, and how likely two of its draws agree."""
    squares = (jax.nn.softmax(params["table"][traj.inputs] / traj.temperature[..., None]) ** 2).sum(axis=-1)
    return table_policy(params, frozen, traj).replace(sum_pi_squared=squares)


def state_values(params, frozen, traj):
    return params["values"][traj.inputs] + params["table"][traj.inputs, 0] * traj.temperature


def score(params, frozen, traj):
    return jnp.where(traj.mask, state_values(params, frozen, traj), 0.0).sum(axis=1)


@lru_cache
def pairs():
    """16 pairs: in the fourth nobody says anything, in the sixth only the chosen answer does."""
    rejected = rollout(1)
    mask = rejected.mask.at[5].set(False)
    return Pairs(rollout(0), rejected.replace(mask=mask))


@lru_cache
def rated():
    """The same, with how much better the chosen one is."""
    return pairs().replace(margin=jnp.linspace(0.0, 1.0, 16).at[3].set(jnp.nan))


@lru_cache
def triples():
    return pairs().replace(gold=rollout(2))


@lru_cache
def explored():
    """The first rollout the policy's, the second the reference's; in row 7 neither could be judged."""
    return xpo_pairs(rollout(0), rollout(1))


TEACHER = np.float32(np.random.default_rng(9).normal(size=(V, V)))  # a table of logits, as the policy's


def compare(params, frozen, batch, divergence):
    """As `models.distillation.make_compare`, of tables."""
    traj = batch.traj
    view = traj if batch.teacher_view is None else batch.teacher_view
    columns = columns_of_same_decisions(traj.mask, view.mask)
    seen = jnp.take_along_axis(view.inputs, columns, axis=1)
    student = params["table"][traj.inputs] / traj.temperature[..., None]
    teacher = jnp.asarray(TEACHER)[seen] / traj.temperature[..., None]
    one = jnp.ones_like(traj.temperature)
    return TokenComparison(
        divergence=divergence(student, teacher, traj.actions),
        logp=chosen_logp(student, traj.actions, one),
        teacher_logp=chosen_logp(teacher, traj.actions, one),
    )


@lru_cache
def taught():
    return Distillation(rollout(0))


@lru_cache
def shown():
    """The teacher reads two columns more and another token before each decision; of row 5 it sees nothing."""

    def behind(x):
        of_columns = x.ndim == 2 and x.shape[1] >= T
        return jnp.pad(x, ((0, 0), (2, 0))) if of_columns else x

    view = jax.tree.map(behind, rollout(0))
    view = view.replace(inputs=(view.inputs + 1) % V, mask=view.mask.at[5].set(False))
    return Distillation(rollout(0), teacher_view=view)


BCO_STATE = {"desirable_mean": 0.3, "desirable_seen": 5.0, "undesirable_mean": -0.2, "undesirable_seen": 3.0}


@lru_cache
def judged():
    state = jax.tree.map(jnp.float32, BCO_STATE)
    return Unpaired(rollout(0), jnp.arange(16) % 3 == 0, mismatched=rollout(1), coefficients=state)


@lru_cache
def steps():
    """Process labels, some missing."""
    traj, draw = rollout(0), np.random.default_rng(4)
    labels = np.where(draw.random((16, 6)) < 0.3, np.nan, draw.choice([0.0, 0.3, 1.0], (16, 6)))
    return traj.replace(rewards=jnp.float32(labels), step_ends=jnp.asarray(draw.random((16, 6)) < 0.6))


@lru_cache
def rankings():
    """8 prompts with up to 4 answers: one has a single one."""
    rows = [rollout(seed) for seed in range(2)]
    traj = jax.tree.map(lambda *x: jnp.concatenate(x).reshape(8, 4, *x[0].shape[1:]), *rows)
    return traj.replace(mask=traj.mask.at[6, 1:].set(False))


def mixed(policy):
    terms = (
        (1.0, preference_term(preferences.sigmoid, 0.5)),
        (0.3, preference_term(preferences.ipo, 0.5, mean_log_ratio)),
        (0.2, chosen_nll),
    )
    return preference_objective(policy, preferences.mixture(*terms), lambda answer: 0.5 * answer.log_ratio)


PAIRED = {
    "dpo": dpo(policy, beta=0.5),
    "cdpo": dpo(policy, partial(preferences.sigmoid, label_smoothing=0.1), 0.5),
    "robust": dpo(policy, preferences.robust, 0.5),
    "hinge": dpo(policy, preferences.hinge, 0.5),
    "ipo": dpo(policy, preferences.ipo, measure=mean_log_ratio),
    "exo": dpo(policy, preferences.exo_pair),
    "nca": dpo(policy, preferences.nca_pair),
    "bco pair": dpo(policy, preferences.bco_pair),
    "sppo": dpo(policy, preferences.sppo_hard),
    "apo zero": dpo(policy, preferences.apo_zero),
    "apo down": dpo(policy, preferences.apo_down),
    "discopop": dpo(policy, preferences.discopop),
    "f-dpo": dpo(policy, measure=f_divergence(preferences.jensen_shannon)),
    "rpo": dpo(policy, nll=1.0),
    "wpo": dpo(policy, pair_weight=wpo),
    "ld-dpo": dpo(policy, token_weights=ld_dpo_weights(0.3)),
    "mixed": mixed(policy),
    "aot": aot(policy, 0.5, 0.1),
    "aot unpaired": aot_unpaired(policy, 0.5, 0.1),
    "cpo": cpo(policy),
    "simpo": simpo(policy),
    "alphapo": simpo(policy, alpha=0.25, nll=0.1),
    "orpo": orpo(policy),
    "dpop": dpop(policy, 0.5, 2.0),
    "odpo": odpo(policy, 0.5, 0.7),
    "step-dpo": step_dpo(policy),
    "reward model": reward_model(score, center_rewards_coefficient=0.01),
}
RATED = ("odpo", "reward model")  # read `Pairs.margin`
CASES = {
    **{name: (objective, rated if name in RATED else pairs) for name, objective in PAIRED.items()},
    "kto": (kto(policy, 0.5, fixed_class_weights(1.0, 1.3)), judged),
    "kto balanced": (kto(policy, 0.5, balanced_class_weights()), judged),
    "bco": (bco(policy, 0.5), judged),
    "implicit prm": (implicit_prm(policy, 0.5), judged),
    "plackett-luce": (ranked_reward_model(score), rankings),
    "kwise": (ranked_reward_model(score, ranking.kwise), rankings),
    "process": (process_reward_model(state_values), steps),
    "xpo": (xpo(policy, beta=0.5, alpha=0.1), explored),
    "tpo": (tpo(policy, 0.5, 0.3), triples),
    "tpo-l": (tpo_l(policy), triples),
    "gkd": (gkd(compare, 0.3), taught),
    "gkd, forward": (gkd(compare, 0.0), taught),
    "gkd, sampled token": (gkd(compare, 1.0, sampled_token), taught),
    "minillm": (minillm(compare), taught),
    "minillm, sums": (minillm(compare, length_normalized=False), taught),
    "sdft": (sdft(compare), shown),
    "sdpo": (sdpo(compare, 0.3, 1.2, partial(top_k, k=3)), shown),
}
# These differ from "dpo" in the function of the margin alone, which has tests of its own: at night.
MARGINS = (
    "cdpo",
    "robust",
    "hinge",
    "exo",
    "nca",
    "bco pair",
    "sppo",
    "apo zero",
    "apo down",
    "discopop",
    "rpo",
    "cpo",
)
EVERY = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.nightly) if name in MARGINS else name for name in CASES]
)

# One of each kind of rows, and of what is carried from step to step.
KINDS = {"dpo", "rpo", "aot", "aot unpaired", "kto balanced", "bco", "plackett-luce", "process", "tpo", "sdpo"}
assert set(CASES) >= KINDS
EVERY_AT_NIGHT = pytest.mark.parametrize(  # by day one of each kind
    "name", [name if name in KINDS else pytest.param(name, marks=pytest.mark.nightly) for name in CASES]
)


@lru_cache
def updater(objective, micro_batches):
    return make_update(objective, GRADIENT, micro_batches)


def learn(objective, batch, micro_batches=1, params=None):
    """The gradient and the metrics (with the loss) of one update."""
    start = state_of(table_params() if params is None else params)
    start = start.replace(coefficients={name: batch.coefficients[name] for name in objective.state})
    state, metrics = updater(objective, micro_batches)(start, batch)
    return jax.device_get((state.opt_state[0].trace, metrics))


@lru_cache
def whole(name):
    objective, batch = CASES[name]
    return learn(objective, batch())


def on_trajectories(change, batch):
    return jax.tree.map(
        lambda x: change(x) if isinstance(x, Trajectory) else x, batch, is_leaf=lambda x: isinstance(x, Trajectory)
    )


@EVERY_AT_NIGHT
def test_micro_batches_change_neither_gradient_nor_metrics(name):
    objective, batch = CASES[name]
    assert max(np.abs(x).max() for x in whole(name)[0].values()) > 1e-3
    assert np.isfinite(whole(name)[1]["loss"])
    agree(learn(objective, batch(), micro_batches=4), whole(name))


@EVERY_AT_NIGHT
def test_row_order_does_not_matter(name):
    objective, batch = CASES[name]
    rows = len(jax.tree.leaves(batch())[0])
    order = np.random.default_rng(0).permutation(rows)
    agree(learn(objective, take_rows(batch(), order)), whole(name))


@EVERY
@pytest.mark.parametrize("garbage", [np.nan, 1e30])
def test_what_stands_at_masked_columns_changes_nothing(name, garbage):
    objective, batch = CASES[name]

    def change(traj):
        facts = {name: getattr(traj, name) for name in ("logp", "ref_logp", "temperature", "rewards")}
        spoilt = {name: jnp.where(traj.mask, x, garbage) for name, x in facts.items()}
        return traj.replace(**spoilt, step_ends=None if traj.step_ends is None else traj.step_ends | ~traj.mask)

    spoilt = on_trajectories(change, batch())
    assert any((np.isnan(x) | (x == 1e30)).any() for x in jax.tree.leaves(spoilt) if x.dtype == jnp.float32)
    chex.assert_trees_all_equal(learn(objective, spoilt), whole(name))


@EVERY_AT_NIGHT
def test_rows_without_tokens_are_as_if_they_were_not_there(name):
    objective, batch = CASES[name]
    row = 6 if batch is rankings else 3
    kept = jax.tree.map(lambda x: np.delete(x, row, axis=0) if jnp.ndim(x) else x, batch())
    if batch is rankings:  # a single answer teaches nothing, but is scored
        agree(learn(objective, kept)[0], whole(name)[0])
    else:
        agree(learn(objective, kept), whole(name))


@EVERY
def test_a_batch_of_nothing_gives_no_gradient_and_no_nan(name):
    objective, batch = CASES[name]
    silent = on_trajectories(lambda traj: traj.replace(mask=traj.mask & False), batch())
    gradient, metrics = learn(objective, silent)
    assert not any(x.any() for x in gradient.values())
    assert metrics["loss"] == metrics["grad_norm"] == metrics["update_norm"] == 0  # other metrics are of nothing


@EVERY_AT_NIGHT
def test_jit_changes_nothing_but_rounding_and_the_width_is_the_callers(name):
    objective, batch = CASES[name]

    def plain(params, batch):
        batch = objective.prepare(params, {}, batch, jax.random.key(0))
        return jax.value_and_grad(lambda p: objective.loss(p, {}, batch)[0])(params)

    with jax.enable_x64(True):
        wide = lambda x: jnp.asarray(x, float if x.dtype == jnp.float32 else None)  # noqa: E731
        loss, gradient = plain(*jax.tree.map(wide, (table_params(), batch())))
        assert {x.dtype.name for x in jax.tree.leaves((loss, gradient))} == {"float64"}
    agree(whole(name)[1]["loss"], loss, rtol=1e-4)
    agree(whole(name)[0], jax.device_get(gradient), rtol=1e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_mesh_changes_neither_gradient_nor_metrics(name):
    objective, batch = CASES[name]
    axes = {"table": ("embed", "mlp"), "values": (None,)}
    carried = {name: jnp.copy(batch().coefficients[name]) for name in objective.state}
    begin = state_of(table_params()).replace(coefficients=carried)
    shardings = state_shardings(make_mesh(2, 2, 2), begin, GRADIENT, axes)
    update = make_update(objective, GRADIENT, 2, shardings)
    state, metrics = update(jax.device_put(begin, shardings.state), batch())
    agree(jax.device_get((state.opt_state[0].trace, metrics)), whole(name))


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.nightly)])
def test_trl_dpo_to_the_last_digits_where_it_is_in_float64(every):
    entry, path = TABLE["trl_dpo_loss"]._replace(rtol=1e-9), test_golden.DATA / "trl_dpo_loss.npz"
    with np.load(path) as z, jax.enable_x64(True):
        cases = json.loads(str(z["__meta__"]))["cases"]
        exact = [name for name, about in cases.items() if "float32" not in about["note"]]
        assert len(exact) > len(cases) / 2
        for name in exact[::every]:
            case = test_golden.read(path, name)
            test_golden.compare(entry, case, test_golden.answer(entry, case))


# ----------------------------------------------------------------------------------------------------------- numpy


def log_ratios(traj):
    """Δ and log π of each row, in float64."""
    z = np.float64(table_params()["table"])[traj.inputs] / np.float64(traj.temperature)[..., None]
    logp = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(logp, np.asarray(traj.actions)[..., None], axis=-1)[..., 0]
    mask = np.asarray(traj.mask)
    return np.where(mask, own - np.float64(traj.ref_logp), 0).sum(axis=1), np.where(mask, own, 0).sum(axis=1)


def sigma(x):
    return 1 / (1 + np.exp(-x))


def test_dpo_loss_and_metrics_by_hand():
    batch = pairs()
    (better, better_logp), (worse, _) = log_ratios(batch.chosen), log_ratios(batch.rejected)
    present = np.arange(16) != 3
    margin = 0.5 * (better - worse)[present]
    metrics = whole("dpo")[1]
    assert metrics["loss"] == pytest.approx(-np.log(sigma(margin)).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((margin > 0).mean())
    assert metrics["margin"] == pytest.approx(margin.mean(), rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.5 * better[present].mean(), rel=1e-5)
    assert metrics["logps/chosen"] == pytest.approx(better_logp[present].mean(), rel=1e-5)


def test_the_metrics_are_of_what_the_loss_compares():
    """A completion of few tokens against a longer one: by the sum of log-ratios the other would be preferred."""
    batch = pairs()
    objective = dpo(policy, beta=5.0, measure=mean_log_ratio)
    better, worse = (
        log_ratios(x)[0] / np.maximum(np.asarray(x.mask).sum(1), 1) for x in (batch.chosen, batch.rejected)
    )
    margin = 5.0 * (better - worse)[np.arange(16) != 3]
    metrics = learn(objective, batch)[1]
    assert metrics["loss"] == pytest.approx(-np.log(sigma(margin)).mean(), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((margin > 0).mean())
    assert metrics["margin"] == pytest.approx(margin.mean(), rel=1e-4)


def test_a_mean_ratio_is_one_of_tokens():
    answer = CompletionStats(
        logp=jnp.float32([-3.0, -8.0]), ref_logp=jnp.float32([-5.0, -6.0]), length=jnp.float32([4.0, 1.0])
    )
    np.testing.assert_allclose(answer.log_ratio, [2.0, -2.0])
    np.testing.assert_allclose(mean_log_ratio(answer), [0.5, -2.0])
    np.testing.assert_allclose(answer.mean_logp, [-0.75, -8.0])


def test_without_a_reference_in_the_batch_the_error_says_what_to_fill():
    batch = pairs().replace(chosen=rollout(0).replace(ref_logp=None))
    with pytest.raises(ValueError, match="fill ref_logp"):
        learn(dpo(policy), batch)


def test_wpo_without_collision_probabilities_says_so():
    with pytest.raises(ValueError, match="sum_pi_squared"):
        learn(dpo(lambda *args: policy(*args).replace(sum_pi_squared=None), pair_weight=wpo), pairs())


def chosen_totals():
    """log π and the number of tokens of each chosen completion of `pairs`, without the pair that says nothing."""
    logp = np.asarray(table_policy(table_params(), {}, pairs().chosen).logp, np.float64)
    mask = np.asarray(pairs().chosen.mask)
    present = mask.any(axis=1) | np.asarray(pairs().rejected.mask).any(axis=1)
    return np.where(mask, logp, 0).sum(axis=1)[present], mask.sum(axis=1)[present]


NLL = {
    "rpo, of each completion": (lambda c: dpo(policy, nll=c), True),
    "rpo beside token weights": (lambda c: dpo(policy, nll=c, token_weights=ld_dpo_weights(0.3)), True),
    "orpo, of each completion": (lambda c: orpo(policy, nll=c), True),
    "cpo, of all tokens": (lambda c: cpo(policy, nll=c), False),
}


@pytest.mark.parametrize("name", NLL)
def test_over_which_tokens_the_nll_is_a_mean(name):
    make, of_each = NLL[name]
    total, length = chosen_totals()
    assert len(set(length)) > 2
    want = -(total / np.maximum(length, 1)).mean() if of_each else -total.sum() / length.sum()
    found = learn(make(0.7), pairs())[1]["loss"] - learn(make(0.0), pairs())[1]["loss"]
    assert found == pytest.approx(0.7 * want, rel=1e-4)


def test_zeros_for_a_reference_make_cpo_of_dpo():
    zero = on_trajectories(lambda traj: traj.replace(ref_logp=jnp.zeros_like(traj.logp)), pairs())
    agree(learn(dpo(policy), zero)[0], learn(cpo(policy, nll=0.0), pairs())[0])


def test_ld_dpo_with_whole_weights_is_dpo():
    agree(learn(dpo(policy, beta=0.5, token_weights=ld_dpo_weights(1.0)), pairs()), whole("dpo"))


@pytest.mark.parametrize("higher", [0.0, 4.0])
def test_kto_by_hand(higher):
    """The reference raised by so much a token: then the policy is below it, and the estimate of the KL is clamped."""
    batch = judged()
    other = batch.mismatched.replace(ref_logp=batch.mismatched.ref_logp + higher - 2.0)
    delta, wrong = log_ratios(batch.traj)[0], log_ratios(other)[0]
    good, present = np.asarray(batch.desirable), np.arange(16) != 3
    z = wrong[present].mean()
    assert z < 0 if higher else z > 0
    z = max(z, 0.0)
    terms = np.where(good, 1 - sigma(0.5 * (delta - z)), 1.3 * (1 - sigma(0.5 * (z - delta))))
    metrics = learn(CASES["kto"][0], batch.replace(mismatched=other))[1]
    assert metrics["kl_mismatched"] == pytest.approx(z, rel=1e-5)
    assert "kl" not in metrics  # nats a decision, which alarms have a threshold for
    assert metrics["loss"] == pytest.approx(terms[present].mean(), rel=1e-5)


def test_balanced_classes_have_the_same_weight():
    objective, batch = kto(policy, 0.5, balanced_class_weights(4 / 3)), judged()
    weight = objective.prepare(table_params(), {}, batch, jax.random.key(0)).weight
    assert weight[batch.desirable].sum() == pytest.approx(4 / 3 * weight[~batch.desirable].sum())


def test_kto_without_mismatched_answers_is_unpaired_apo_zero():
    batch = judged().replace(mismatched=None)
    delta, good, present = log_ratios(batch.traj)[0], np.asarray(batch.desirable), np.arange(16) != 3
    terms = np.where(good, 1 - sigma(0.5 * delta), sigma(0.5 * delta))
    metrics = learn(kto(policy, 0.5), batch)[1]
    assert metrics["loss"] == pytest.approx(terms[present].mean(), rel=1e-5)
    assert metrics["kl_mismatched"] == 0


STILL = optax.sgd(0.0)  # the parameters stay where they are


def test_bco_shifts_by_the_mean_of_the_means_of_both_classes():
    """Of all completions so far: a third is desirable, so that their common mean is another number."""
    update, seen = make_update(bco(policy, 0.5), STILL), {True: [], False: []}
    state = state_of(table_params(), STILL).replace(coefficients=initial_state())
    desirable = np.delete(np.asarray(judged().desirable), 3)
    for traj in (rollout(0), rollout(1), rollout(2)):
        rewards = 0.5 * np.delete(log_ratios(traj)[0], 3)
        for good in seen:
            seen[good].extend(rewards[desirable == good])
        state, metrics = update(state, judged().replace(traj=traj, coefficients={}))
        shift = (np.mean(seen[True]) + np.mean(seen[False])) / 2
        assert metrics["reward_shift"] == pytest.approx(shift, rel=1e-4)
        assert abs(np.mean(seen[True] + seen[False]) - shift) > 1e-2
        assert state.coefficients["desirable_seen"] == len(seen[True])
        assert state.coefficients["undesirable_seen"] == len(seen[False])
        scores = np.where(desirable, 1, -1) * (rewards - shift)
        assert metrics["loss"] == pytest.approx(np.logaddexp(0, -scores).mean(), rel=1e-4)


def test_a_class_that_bco_never_saw_does_not_move_its_shift():
    update = make_update(bco(policy, 0.5), STILL)
    state = state_of(table_params(), STILL).replace(coefficients=initial_state())
    _, metrics = update(state, judged().replace(desirable=jnp.ones(16, bool), coefficients={}))
    assert metrics["reward_shift"] == pytest.approx(0.5 * np.delete(log_ratios(rollout(0))[0], 3).mean(), rel=1e-4)


CARRIED = [name for name, (objective, _) in CASES.items() if objective.state]


@pytest.mark.parametrize("name", CARRIED)
@pytest.mark.parametrize("cuts", [1, 2, 4, 16])
def test_the_state_of_an_objective_is_the_same_for_any_cut_into_minibatches(name, cuts):
    """Of an update that leaves the parameters where they are, so that only the cut differs."""
    objective, make = CASES[name]
    start = state_of(table_params(), STILL).replace(coefficients=jax.tree.map(jnp.copy, make().coefficients))
    state, _ = learn_in_minibatches(make_update(objective, STILL), start, make(), num_minibatches=cuts)
    rewards = 0.5 * np.delete(log_ratios(rollout(0))[0], 3)
    desirable = np.delete(np.asarray(judged().desirable), 3)
    for name, rows in (("desirable", desirable), ("undesirable", ~desirable)):
        before, seen = BCO_STATE[f"{name}_mean"], BCO_STATE[f"{name}_seen"]
        want = (seen * before + rewards[rows].sum()) / (seen + rows.sum())
        assert state.coefficients[f"{name}_seen"] == seen + rows.sum()
        assert state.coefficients[f"{name}_mean"] == pytest.approx(want, rel=1e-5)


def test_a_state_that_nobody_started_is_one_error():
    with pytest.raises(
        ValueError, match=r"undesirable_mean, undesirable_seen from one update to the next: put first values"
    ):
        updater(bco(policy, 0.5), 1)(state_of(table_params()), judged())


def test_bco_goes_on_as_trl_does():
    """The second recorded step starts where the first ended."""
    state, path = initial_state(), test_golden.DATA / "trl_bco_loss.npz"
    for name in ("step0", "step1"):
        case = test_golden.read(path, name)
        logp, ref_logp = (
            jnp.concatenate([jnp.asarray(case.ins[f"{who}_{side}_logps"]) for side in ("chosen", "rejected")])
            for who in ("policy", "reference")
        )
        good = jnp.ones(len(logp), bool)
        batch = Unpaired(one_token(len(logp), ref_logp=ref_logp), good, coefficients=state)
        objective = bco(reads_logp, case.hyper["beta"])
        state = objective.prepare({"logp": logp}, {}, batch, jax.random.key(0)).coefficients
        assert float(state["reward_shift"]) == pytest.approx(float(case.outs["delta"]), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ reward models


def test_a_ranking_of_two_is_a_comparison():
    chosen, rejected = rollout(0), rollout(1)
    of_two = jax.tree.map(lambda *x: jnp.stack(x, axis=1), chosen, rejected)
    of_two = of_two.replace(mask=of_two.mask.at[5].set(False))
    silent = jnp.arange(16)[:, None] == 5
    compared = Pairs(chosen.replace(mask=chosen.mask & ~silent), rejected.replace(mask=rejected.mask & ~silent))
    for loss in (ranking.plackett_luce, ranking.kwise):
        agree(learn(ranked_reward_model(score, loss), of_two)[0], learn(reward_model(score), compared)[0])


def test_process_labels_by_hand():
    traj = steps()
    z = np.asarray(state_values(table_params(), {}, traj), np.float64)
    here = np.asarray(traj.mask & traj.step_ends & ~jnp.isnan(traj.rewards))
    y = np.asarray(traj.rewards, np.float64)[here]
    want = -(y * np.log(sigma(z[here])) + (1 - y) * np.log(1 - sigma(z[here]))).mean()
    metrics = whole("process")[1]
    assert metrics["loss"] == pytest.approx(want, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(((z[here] > 0) == (y > 0.5)).mean())
    assert 0 < here.sum() < np.asarray(traj.mask & traj.step_ends).sum()


# ----------------------------------------------------------------------------------------------------------- online


def answered(rewards, groups, ended=True):
    """One decision a row; its input is the number of the row."""
    n = len(rewards)
    column = lambda x: jnp.asarray(x)[:, None]  # noqa: E731
    one = jnp.ones((n, 1))
    return Trajectory(
        inputs=column(np.arange(n)),
        actions=column(np.zeros(n, int)),
        logp=-one,
        ref_logp=-one,
        mask=one > 0,
        rewards=column(np.asarray(rewards, np.float32)),
        terminated=column(np.broadcast_to(ended, n)),
        group=jnp.asarray(groups),
    )


def named(found, side):
    return np.asarray(getattr(found, side).inputs)[:, 0].tolist()


def test_the_best_answer_is_paired_with_the_worst():
    traj = answered([1, 5, 2, 7, 3, 0], [4, 9, 4, 9, 4, 9])
    found = jax.jit(partial(online_pairs, num_generations=3))(traj)
    assert (named(found, "chosen"), named(found, "rejected")) == ([4, 3], [0, 5])
    order = np.random.default_rng(0).permutation(6)
    other = jax.tree.map(lambda x: x[order], traj)
    moved = online_pairs(other.replace(group=1000 - 3 * other.group), num_generations=3)
    assert (named(moved, "chosen"), named(moved, "rejected")) == ([3, 4], [5, 0])  # groups in the order of their ids


@pytest.mark.parametrize("ties", [False, True])
def test_of_equal_answers_the_first_is_chosen_and_the_last_rejected(ties):
    """Where all are equally good there is nothing to choose, unless ties are asked for."""
    found = online_pairs(answered([2, 2, 2, 1, 1, 2], [0, 0, 0, 1, 1, 1]), num_generations=3, ties=ties)
    assert (named(found, "chosen"), named(found, "rejected")) == ([0, 5], [2, 4])
    for side in (found.chosen, found.rejected):
        np.testing.assert_array_equal(side.mask, [[ties], [True]])


def test_unjudged_answers_are_in_no_pair():
    nan = np.nan
    found = online_pairs(answered([nan, 1, 2, nan, nan, 5], [0, 0, 0, 1, 1, 1]), num_generations=3)
    assert named(found, "chosen")[0] == 2
    assert named(found, "rejected")[0] == 1
    np.testing.assert_array_equal(found.chosen.mask, [[True], [False]])
    np.testing.assert_array_equal(found.rejected.mask, [[True], [False]])


def test_rows_that_are_no_groups_are_refused():
    with pytest.raises(ValueError, match="groups of 4"):
        online_pairs(answered([1, 2], [0, 0]), num_generations=4)


# ----------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("algorithm", [sft(), dft()])
def test_packed_demonstrations_teach_what_single_ones_do(algorithm):
    """The table's state is the token seen: only a target across a border of segments could tell the rows apart."""
    draw = np.random.default_rng(3)
    tokens = draw.integers(V, size=(4, 2, 4))
    chosen = np.ones((4, 2, 4), bool)  # the first token of a segment too: the door takes it out
    rows = {"single": ((8, 4), np.ones((8, 4), int)), "packed": ((4, 8), np.repeat([[1, 2]], 4, axis=1).repeat(4, 0))}

    def gradient(shape, segments):
        one = jnp.ones(shape)
        traj = trajectory_of_tokens(
            tokens.reshape(shape), segments, jnp.asarray(chosen.reshape(shape)), one, temperature=one
        )
        assert traj.mask.sum() == 4 * 2 * 3
        objective = policy_objective(table_policy, algorithm)
        return learn(objective, algorithm.credit(traj, {}))[0]

    agree(*(gradient(*rows[name]) for name in rows))


def test_a_pair_that_nobody_rated_has_no_margin():
    batch = rated()
    none, zero = (batch.replace(margin=batch.margin.at[5].set(x)) for x in (jnp.nan, 0.0))
    agree(learn(CASES["reward model"][0], none), learn(CASES["reward model"][0], zero))


def test_a_pair_with_an_empty_completion_teaches_a_reward_model_nothing():
    """A score read at the last token is NaN where there is none."""

    def at_last_token(params, frozen, traj):
        return jnp.where(traj.mask.any(axis=1), score(params, frozen, traj), jnp.nan)

    batch = pairs()
    mute = batch.chosen.mask.at[1].set(False)
    batch = batch.replace(chosen=batch.chosen.replace(mask=mute))
    kept = jax.tree.map(lambda x: jnp.delete(x, jnp.array([1, 3, 5]), axis=0), batch)
    gradient, metrics = learn(reward_model(at_last_token), batch)
    want, wanted = learn(reward_model(at_last_token), kept)
    assert np.isfinite(metrics["loss"])
    agree((gradient, metrics["loss"]), (want, wanted["loss"]))


def test_kto_needs_one_mismatched_completion_for_each_prompt():
    batch = judged()
    half = jax.tree.map(lambda x: x[:8], batch.mismatched)
    with pytest.raises(ValueError, match="8 mismatched rows for 16"):
        learn(kto(policy, 0.5), batch.replace(mismatched=half))
