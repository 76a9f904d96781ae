"""Preference losses, reward models and supervised losses against the peers: through the objectives, masks, shift and
weights included. The policy is a table: the state is the number of a cell of the peer's array, counted row by row.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rljax.algorithms.aot import aot, aot_unpaired
from rljax.algorithms.bco import initial_state
from rljax.algorithms.common.pairs import preference_objective, uniform_token_weights
from rljax.algorithms.cpo import cpo, simpo
from rljax.algorithms.dpo import (
    chosen_nll,
    dpo,
    f_divergence,
    ld_dpo_weights,
    mean_log_ratio,
    preference_term,
    total_log_ratio,
    uniform_pair_weight,
    wpo,
)
from rljax.algorithms.kto import fixed_class_weights, kto
from rljax.algorithms.online_dpo import online_pairs
from rljax.algorithms.orpo import orpo
from rljax.algorithms.process_reward_model import process_reward_model
from rljax.algorithms.reward_model import reward_model
from rljax.algorithms.sft import dft, sft
from rljax.ops import logprobs, preferences
from rljax.ops.weights import seq_mean_token_mean, token_mean
from rljax.train.objective import policy_objective
from rljax.types import Pairs, PolicyOutput, Trajectory, Unpaired, trajectory_of_tokens
from tests.dialects import (
    openrlhf_sequence_mean,
    trl_alpha_divergence,
    trl_bco_of_one_class,
    trl_float32_mean,
    trl_weight_by_log_probs,
)
from tests.golden.entry import Case, Entry, gradient


def reads_logits(params, frozen, traj):
    """A policy whose logits stand in a table [cells V]."""
    z, one = params["logits"][traj.inputs], jnp.ones(traj.inputs.shape)
    return PolicyOutput(
        logp=logprobs.chosen_logp(z, traj.actions, one),
        entropy=logprobs.entropy(z, one),
        sum_pi_squared=logprobs.sum_pi_squared(z, one),
    )


def reads_logp(params, frozen, traj):
    """A policy whose log-probs stand in a table [cells]; the rest it knows beforehand."""
    known = {name: table[traj.inputs] for name, table in frozen.items()}
    return PolicyOutput(logp=params["logp"][traj.inputs], **known)


def table(x):
    """[B T ...] as [cells ...]."""
    return x.reshape(-1, *x.shape[2:])


def rows_of(mask, first_cell=0, **facts) -> Trajectory:
    """Decisions that are given as such, without a shift."""
    cells = first_cell + jnp.arange(mask.size).reshape(mask.shape)
    return Trajectory(inputs=cells, actions=0 * cells, logp=0.0 * cells, mask=mask > 0, **facts)


def one_token(n: int, first_cell=0, ref_logp=None) -> Trajectory:
    """Rows whose whole answer is one decision: sums and means are that decision's number."""
    ref_logp = None if ref_logp is None else ref_logp[:, None]
    return rows_of(jnp.ones((n, 1)), first_cell, ref_logp=ref_logp)


def from_tokens(tokens, chosen, first_cell=0) -> Trajectory:
    """Whole rows of tokens: here the shift happens."""
    traj = trajectory_of_tokens(tokens, jnp.ones_like(tokens), chosen > 0, jnp.zeros(tokens.shape))
    cells = first_cell + jnp.arange(tokens.size).reshape(tokens.shape)
    return traj.replace(inputs=cells[:, :-1])


def with_reference(traj: Trajectory, ref_logits) -> Trajectory:
    return traj.replace(ref_logp=reads_logits({"logits": table(ref_logits)}, {}, traj).logp)


def half(tree, second: bool):
    """Rows [chosen; rejected]."""
    return jax.tree.map(lambda x: jnp.split(x, 2)[second], tree)


def halves(traj: Trajectory) -> Pairs:
    return Pairs(chosen=half(traj, False), rejected=half(traj, True))


def learn(objective, batch, params_of, case: Case, *names: str, frozen=None):
    """(loss, metrics, gradient by each name) of the objective, prepared as an update does."""
    frozen, params = frozen or {}, params_of(case.ins)
    batch = objective.prepare(params, frozen, batch, jax.random.key(0))
    _, metrics = objective.loss(params, frozen, batch)
    loss, *grads = gradient(lambda ins: objective.loss(params_of(ins), frozen, batch)[0], case.ins, *names)
    return loss, {name: total / count for name, (total, count) in metrics.items()}, *grads


# ------------------------------------------------------------------------------------------------------------ DPO


def trl_term(loss_type: str, hyper: dict):
    """TRL's loss_type as (loss, what it compares). TRL's sigmoid ignores label_smoothing."""
    smoothing = {"label_smoothing": hyper.get("label_smoothing", 0.0)}
    losses = {
        "sigmoid": (preferences.sigmoid, total_log_ratio),
        "hinge": (preferences.hinge, total_log_ratio),
        "ipo": (preferences.ipo, mean_log_ratio),
        "exo_pair": (partial(preferences.exo_pair, **smoothing), total_log_ratio),
        "nca_pair": (preferences.nca_pair, total_log_ratio),
        "robust": (partial(preferences.robust, **smoothing), total_log_ratio),
        "bco_pair": (preferences.bco_pair, total_log_ratio),
        "sppo_hard": (preferences.sppo_hard, total_log_ratio),
        "apo_zero": (preferences.apo_zero, total_log_ratio),
        "apo_down": (preferences.apo_down, total_log_ratio),
        "discopop": (partial(preferences.discopop, tau=hyper.get("discopop_tau")), total_log_ratio),
        "sigmoid_norm": (preferences.sigmoid, mean_log_ratio),
    }
    return losses[loss_type]


def trl_mixture(policy, hyper: dict):
    """TRL's list of loss types."""
    beta = hyper["beta"]

    def term(loss_type):
        if loss_type == "sft":
            return chosen_nll
        loss, measure = trl_term(loss_type, hyper)
        return preference_term(loss, beta, measure)

    mixed = preferences.mixture(*zip(hyper["loss_weights"], map(term, hyper["loss_types"]), strict=True))
    return preference_objective(policy, mixed, lambda answer: beta * answer.log_ratio)


def trl_objective(policy, hyper: dict):
    beta, loss_type = hyper["beta"], hyper.get("loss_type", "sigmoid")
    if "loss_types" in hyper:
        return trl_mixture(policy, hyper)
    if loss_type.startswith("aot"):
        return {"aot": aot, "aot_unpaired": aot_unpaired}[loss_type](policy, beta, hyper["label_smoothing"])
    loss, measure = trl_term(loss_type, hyper)
    slope = {
        "reverse_kl": preferences.reverse_kl,
        "forward_kl": preferences.forward_kl,
        "js_divergence": preferences.jensen_shannon,
        "alpha_divergence": trl_alpha_divergence(hyper.get("f_alpha_divergence_coef", 0.5)),
    }[hyper.get("f_divergence_type", "reverse_kl")]
    return dpo(
        policy,
        loss,
        beta,
        measure=f_divergence(slope, measure),
        pair_weight=wpo if hyper.get("use_weighting") else uniform_pair_weight,
        token_weights=ld_dpo_weights(hyper["ld_alpha"]) if "ld_alpha" in hyper else uniform_token_weights,
    )


def trl_dpo(case: Case) -> dict:
    """From logits to the gradient of logits; and once more from the log-probs of the tokens."""
    traj = with_reference(from_tokens(case.ins["input_ids"], case.ins["completion_mask"]), case.ins["ref_logits"])
    hyper = case.hyper
    if hyper.get("loss_type") == "sft":
        hyper = {"beta": hyper["beta"], "loss_types": ["sft"], "loss_weights": [1.0]}
    by_logits = trl_objective(reads_logits, hyper)
    loss, metrics, grad = learn(by_logits, halves(traj), lambda x: {"logits": table(x["logits"])}, case, "logits")
    if hyper.get("loss_type") in ("ipo", "sigmoid_norm") or "f_divergence_type" in hyper:  # TRL's rewards are β Σ Δ
        sums = dpo(reads_logits, beta=hyper["beta"])
        batch = sums.prepare({}, {}, halves(traj), None)
        _, of_sums = sums.loss({"logits": table(case.ins["logits"])}, {}, batch)
        metrics |= {name: total / count for name, (total, count) in of_sums.items() if name != "entropy"}

    seen = reads_logits({"logits": table(case.ins["logits"])}, {}, traj)
    wide = lambda x: table(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1.0))  # noqa: E731  one cell a token
    knows = {"sum_pi_squared": wide(seen.sum_pi_squared)}
    case = case._replace(ins={"logp": seen.logp})
    if "loss_types" in hyper:
        weights = map(trl_weight_by_log_probs, hyper["loss_types"], hyper["loss_weights"])
        hyper = hyper | {"loss_weights": list(weights)}
    by_logp = trl_objective(reads_logp, hyper)
    _, _, grad_logp = learn(by_logp, halves(traj), lambda x: {"logp": wide(x["logp"])}, case, "logp", frozen=knows)
    return {
        "loss": loss,
        "grad_logits": grad,
        "grad_per_token_logps": grad_logp,
        "per_token_logps": seen.logp,
        "ref_per_token_logps": traj.ref_logp,
        "metric entropy": metrics["entropy"],
        "metric rewards/chosen": metrics["rewards/chosen"],
        "metric rewards/rejected": metrics["rewards/rejected"],
        "metric rewards/margins": metrics["margin"],
        "metric rewards/accuracies": trl_float32_mean(metrics["accuracy"]),
    }


def stacked(*names):
    """The peer's [B] inputs, one under the other, as the table of a policy."""
    return lambda x: {"logp": jnp.concatenate([x[name] for name in names])}


CHOSEN, REJECTED = POLICY = ("policy_chosen_logps", "policy_rejected_logps")


def one_token_pairs(case: Case) -> Pairs:
    better, worse = (case.ins[name] for name in POLICY)
    refs = (case.ins.get(f"reference_{side}_logps") for side in ("chosen", "rejected"))
    return Pairs(
        *(one_token(len(x), c, ref) for x, c, ref in zip((better, worse), (0, len(better)), refs, strict=True))
    )


def openrlhf_dpo(case: Case) -> dict:
    """OpenRLHF's IPO compares sums."""
    beta, smoothing = case.hyper["beta"], case.hyper.get("label_smoothing", 0.0)
    loss = preferences.ipo if case.hyper.get("ipo") else partial(preferences.sigmoid, label_smoothing=smoothing)
    pairs = one_token_pairs(case)
    value, _, better, worse = learn(dpo(reads_logp, loss, beta), pairs, stacked(*POLICY), case, *POLICY)
    return {
        "loss": value,
        "grad_chosen": better,
        "grad_rejected": worse,
        "chosen_rewards": beta * (case.ins[CHOSEN] - pairs.chosen.ref_logp[:, 0]),
        "rejected_rewards": beta * (case.ins[REJECTED] - pairs.rejected.ref_logp[:, 0]),
    }


def trl_cpo(case: Case) -> dict:
    """TRL applies AlphaPO's transformation and label smoothing whatever the loss."""
    hyper, beta = case.hyper, case.hyper["beta"]
    transformed = partial(preferences.alphapo_reward, alpha=hyper["alpha"])
    better, worse = (transformed(case.ins[name]) for name in POLICY)
    smoothing = {"label_smoothing": hyper["label_smoothing"]}
    if hyper["loss_type"] == "simpo":
        objective = simpo(reads_logp, beta, hyper["simpo_gamma"], hyper["alpha"], **smoothing)
        losses = preferences.simpo_loss(better, worse, beta, hyper["simpo_gamma"], **smoothing)
    else:
        sigmoid = partial(preferences.sigmoid, **smoothing)
        loss = {"sigmoid": sigmoid, "hinge": preferences.hinge, "ipo": preferences.ipo}[hyper["loss_type"]]
        of_logp = lambda w, l, beta: loss(transformed(w), transformed(l), beta)  # noqa: E731, E741
        objective, losses = cpo(reads_logp, of_logp, beta, nll=0.0), loss(better, worse, beta)
    value, _, *grads = learn(objective, one_token_pairs(case), stacked(*POLICY), case, *POLICY)
    return {
        "loss": value,
        "losses": losses,
        "grad_chosen": grads[0],
        "grad_rejected": grads[1],
        "chosen_rewards": beta * better,
        "rejected_rewards": beta * worse,
    }


def trl_orpo(case: Case) -> dict:
    """The peer's function returns what it later subtracts from the likelihood: minus the loss."""
    better, worse = (case.ins[name] for name in POLICY)
    objective = orpo(reads_logp, case.hyper["beta"], nll=0.0)
    _, _, *grads = learn(objective, one_token_pairs(case), stacked(*POLICY), case, *POLICY)
    odds = preferences.odds_ratio(better, worse)
    return {
        "losses": -case.hyper["beta"] * odds,
        "mean_log_sigmoid": -odds.mean(),
        "mean_log_odds": (preferences.log_odds(better) - preferences.log_odds(worse)).mean(),
        "grad_chosen": -grads[0],
        "grad_rejected": -grads[1],
    }


def trl_online_dpo(case: Case) -> dict:
    """Rows i and i + n answer one prompt."""
    mask, beta = case.ins["completion_mask"], case.hyper["beta"]
    last = (mask > 0) & (jnp.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    traj = rows_of(mask, ref_logp=case.ins["ref_logprobs"], rewards=last * case.ins["scores"][:, None])
    pairs = online_pairs(traj.replace(group=jnp.tile(jnp.arange(len(mask) // 2), 2)), ties=True)
    loss = {"sigmoid": preferences.sigmoid, "ipo": preferences.ipo}[case.hyper["loss_type"]]
    params_of = lambda x: {"logp": table(x["logprobs"])}  # noqa: E731
    value, _, grad = learn(dpo(reads_logp, loss, beta), pairs, params_of, case, "logprobs")
    delta = ((case.ins["logprobs"] - case.ins["ref_logprobs"]) * mask).sum(axis=1)
    better, worse = (side.inputs[:, 0] // case.width for side in (pairs.chosen, pairs.rejected))
    return {
        "loss": value,
        "losses": loss(delta[better], delta[worse], beta),
        "grad_logprobs": grad,
        "chosen_indices": better,
        "rejected_indices": worse,
    }


# -------------------------------------------------------------------------------------------------- judged one by one


def trl_kto(case: Case) -> dict:
    """Two tables, one under the other: the answers' and the mismatched ones'."""
    ins, hyper = case.ins, case.hyper
    traj = with_reference(from_tokens(ins["input_ids"], ins["completion_mask"]), ins["ref_logits"])
    other = with_reference(from_tokens(ins["KL_input_ids"], ins["KL_completion_mask"]), ins["ref_KL_logits"])
    other = other.replace(inputs=other.inputs + ins["input_ids"].size)
    params_of = lambda x: {"logits": jnp.concatenate([table(x["logits"]), table(x["KL_logits"])])}  # noqa: E731
    mismatched = other if hyper["loss_type"] == "kto" else None  # apo_zero_unpaired
    batch = Unpaired(traj, desirable=ins["label"] > 0, mismatched=mismatched)
    weights = fixed_class_weights(hyper["desirable_weight"], hyper["undesirable_weight"])
    loss, metrics, grad = learn(kto(reads_logits, hyper["beta"], weights), batch, params_of, case, "logits")
    return {"loss": loss, "kl": metrics["kl_mismatched"], "grad_logits": grad}


def trl_bco(case: Case) -> dict:
    """`stepN` goes on from N batches of as many rows, whose mean is not recorded: it is taken from the answer."""
    beta, n = case.hyper["beta"], len(case.ins[CHOSEN])
    logp = stacked(*POLICY)(case.ins)["logp"]
    ref_logp = jnp.concatenate([case.ins[f"reference_{side}_logps"] for side in ("chosen", "rejected")])
    rewards, seen = beta * (logp - ref_logp), int(case.name.removeprefix("step")) * len(logp)
    before = (case.outs["delta"] * (seen + len(logp)) - rewards.sum()) / max(seen, 1)
    state = initial_state() | {
        "desirable_mean": jnp.where(seen > 0, before, 0.0),
        "desirable_seen": jnp.asarray(float(seen)),
    }
    good = jnp.arange(len(logp)) < n
    batch = Unpaired(one_token(len(logp), ref_logp=ref_logp), desirable=good, coefficients=state)
    loss, metrics, *grads = learn(trl_bco_of_one_class(reads_logp, beta), batch, stacked(*POLICY), case, *POLICY)
    return {
        "loss": loss,
        "losses": preferences.bco_loss(logp - ref_logp, good, metrics["reward_shift"], beta),
        "delta": metrics["reward_shift"],
        "grad_chosen": grads[0],
        "grad_rejected": grads[1],
    }


# ------------------------------------------------------------------------------------------------------ reward models


def reads_score(params, frozen, traj):
    return params["logp"][traj.inputs[:, 0]]


def trl_reward(case: Case) -> dict:
    n = len(case.ins["rewards"]) // 2
    pairs = Pairs(one_token(n), one_token(n, n), margin=case.ins.get("margin"))
    objective = reward_model(reads_score, case.hyper["center_rewards_coefficient"] or 0.0)
    loss, metrics, grad = learn(objective, pairs, stacked("rewards"), case, "rewards")
    return {
        "loss": loss,
        "grad_rewards": grad,
        "metric accuracy": trl_float32_mean(metrics["accuracy"]),
        "metric margin": metrics["margin"],
        "metric mean_reward": metrics["reward"],
        "metric max_reward": metrics["reward_max"],
        "metric min_reward": metrics["reward_min"],
    }


def openrlhf_reward(case: Case) -> dict:
    """PairWiseLoss and LogExpLoss are one function."""
    names = ("chosen_reward", "reject_reward")
    n = len(case.ins["chosen_reward"])
    pairs = Pairs(one_token(n), one_token(n, n), margin=case.ins.get("margin"))
    loss, _, *grads = learn(reward_model(reads_score), pairs, stacked(*names), case, *names)
    return {"loss": loss, "grad_chosen": grads[0], "grad_rejected": grads[1]}


def process_reward(case: Case) -> dict:
    """Two classes: the log-odds are the difference of their logits. Label -100 is none."""
    labels = case.ins["labels"]
    traj = rows_of(jnp.ones(labels.shape), rewards=labels.astype(float), step_ends=labels != -100)
    log_odds = lambda params, frozen, traj: jnp.diff(params["logits"][traj.inputs])[..., 0]  # noqa: E731
    params_of = lambda x: {"logits": table(x["logits"])}  # noqa: E731
    loss, _, grad = learn(process_reward_model(log_odds), traj, params_of, case, "logits")
    return {"loss": loss, "grad_logits": grad}


# --------------------------------------------------------------------------------------------------------- imitation


def imitate(policy, algorithm, traj, params_of, case: Case, name: str):
    loss, _, grad = learn(policy_objective(policy, algorithm), algorithm.credit(traj, {}), params_of, case, name)
    return loss, grad


def openrlhf_sft(case: Case) -> dict:
    by_row = openrlhf_sequence_mean(seq_mean_token_mean)
    algorithm = sft(token_mean if case.hyper["token_level_loss"] else by_row)
    params_of = lambda x: {"logp": table(x["per_token_logps"])}  # noqa: E731
    traj = rows_of(case.ins["loss_mask"])
    loss, grad = imitate(reads_logp, algorithm, traj, params_of, case, "per_token_logps")
    return {"loss": loss, "grad": grad}


def trl_dft(case: Case) -> dict:
    labels = case.ins["labels"]
    traj = from_tokens(jnp.maximum(labels, 0), labels != -100)
    params_of = lambda x: {"logits": table(x["logits"])}  # noqa: E731
    loss, grad = imitate(reads_logits, dft(), traj, params_of, case, "logits")
    return {"loss": loss, "grad_logits": grad}


def trl_logps(case: Case) -> dict:
    actions, one = case.ins["index"], jnp.ones(case.ins["index"].shape)

    def loss(x):
        z = x["logits"]
        return logprobs.chosen_logp(z, actions, one).sum() + 2 * logprobs.entropy(z, one).sum()

    return {
        "logps": logprobs.chosen_logp(case.ins["logits"], actions, one),
        "entropy": logprobs.entropy(case.ins["logits"], one),
        "grad_logits": gradient(loss, case.ins, "logits")[1],
    }


TABLE: dict[str, Entry] = {
    # Its case f_alpha_float32 is in float32; tests/algorithms/test_preferences.py holds the others to 1e-9.
    "trl_dpo_loss": Entry("dpo, aot, aot_unpaired", trl_dpo, rtol=1e-5, mask="completion_mask", halves=True),
    "openrlhf_dpo_loss": Entry("dpo", openrlhf_dpo),
    "trl_cpo_simpo_loss": Entry("cpo, simpo", trl_cpo),
    "trl_orpo_odds_ratio": Entry("orpo", trl_orpo, rtol=1e-5),
    "trl_online_dpo_loss": Entry(
        "online_pairs, dpo",
        trl_online_dpo,
        mask="completion_mask",
        not_moved="the answer names rows by their place; tests/algorithms/test_preferences.py moves them",
    ),
    "trl_kto_loss": Entry("kto", trl_kto, mask="completion_mask"),
    "trl_bco_loss": Entry("bco", trl_bco, rtol=1e-5),
    "trl_reward_loss": Entry(
        "reward_model",
        trl_reward,
        not_compared={"metric num_tokens": "TRL's running count of the tokens fed, an input the file does not have"},
    ),
    "openrlhf_reward_loss": Entry("reward_model", openrlhf_reward),
    "prm_token_classification_loss": Entry("process_reward_model", process_reward, rtol=1e-5),
    "openrlhf_sft_loss": Entry("sft", openrlhf_sft, mask="loss_mask"),
    "trl_dft_loss": Entry("dft", trl_dft, mask="labels"),
    "trl_logps_entropy": Entry("ops.logprobs", trl_logps),
}
