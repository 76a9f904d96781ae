"""Writes docs/taxonomy.md, the methods as a tree and a table: python -m tests.taxonomy

What samples a method learns from is classified in tests/catalogue.py, whose words tests hold against the code. The
other columns are found here: weights and needs are read from the Algorithm, and what a gradient depends on is measured
on the rollout of the laws.
"""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rljax.types import Algorithm
from tests import catalogue
from tests.algorithms.tiny import ALGORITHMS, asked_for, rollout, table_params, table_policy

PAGE = Path(__file__).resolve().parents[1] / "docs" / "taxonomy.md"

INTRODUCTION = """\
# Taxonomy

Written by `make tables` (`python -m tests.taxonomy`); do not edit. [algorithms.md](algorithms.md) has the paper, the
equation and the settings of each method.

Everything in the table is model-free: nothing learns or plans with a model of the environment. Wrappers (KL terms,
entropy, shaped rewards, corrections for another sampler) go around any of the methods and are left out."""

COLUMNS = """\
- **samples**: of which policy it learns from; *near on-policy* is the policy a few updates ago.
- **critic**: whether it reads `Trajectory.values`.
- **group**: whether it compares the completions of a prompt.
- **ratio**: what, besides the advantage, the gradient of a decision depends on. A *dash*: nothing, so that the method
  is right for one update of a rollout, or for samples of any policy (supervised ones). *token*: the policy's log-prob
  of that decision. *sequence*: log-probs of other decisions of the completion too. *group*: those of other completions
  of the prompt. *in the advantage*: nothing, but the advantages contain ratios of the policy before the update to the
  one that sampled. Measured: a log-prob is changed, near those of the policy that sampled.
- **KL**: where the method itself has one. `with_kl` and `kl_in_reward` add one to any.
- **weights**: how decisions become a sum, by default (`ops.weights`)."""


MAZE = "[maze.py](../experiments/maze.py)"
VALUES = {
    "planning, P and R known": ["value iteration ([optimal_values](../rljax/envs/tabular.py))"],
    "on-policy": [f"SARSA and expected SARSA ({MAZE})"],
    "off-policy": [f"Q-learning and double Q-learning ({MAZE})", catalogue.link("dqn.dqn")],
}


class Row(NamedTuple):
    """A method of the table."""

    name: str  # module.name, as in tests/catalogue.py
    samples: str
    learns: str
    critic: bool
    group: bool
    ratio: str
    kl: str
    weights: str


@lru_cache
def entries() -> dict[str, str]:
    """Every method that is an Algorithm and takes part in the laws by itself, and its entry there."""
    alone: dict[str, str] = {}
    for entry, used in catalogue.methods_in_algorithms().items():
        if len(used) == 1:
            (name,) = used
            if name not in alone or entry == catalogue.base_name(name):
                alone[name] = entry
    return {name: alone[name] for name in catalogue.rows() if name in alone}


def rows(ratios: dict[str, str]) -> list[Row]:
    """ratios: name of the method -> what `dependence` finds."""
    kinds = catalogue.rows()
    found = []
    for name, entry in entries().items():
        algorithm = ALGORITHMS[entry]
        weights = algorithm.weights.__qualname__.split(".")[0]
        kl = kinds[name].constraint if "KL" in kinds[name].constraint else "–"
        critic = "values" in algorithm.needs
        group = "groups" in kinds[name].data
        found.append(Row(name, kinds[name].samples, kinds[name].learns, critic, group, ratios[name], kl, weights))
    return found


def measured_ratios() -> dict[str, str]:
    return {name: dependence(ALGORITHMS[entry]) for name, entry in entries().items()}


def dependence(algorithm: Algorithm) -> str:
    """What the gradient of a decision's loss by its own log-prob depends on: –, token, sequence or group.

    "in the advantage": on none of these, but the advantages depend on ratios of the policy before the update to the one
    that sampled: on the log-probs of the first, and not where both change alike.
    """
    traj = rollout()
    logp = jnp.where(traj.mask, traj.logp, 0.0)
    traj = asked_for(algorithm, traj.replace(logp=logp, old_logp=logp))
    batch = algorithm.credit(traj, {})
    output = table_policy(table_params(), {}, traj)

    def total(logp):
        changed = output.replace(logp=logp)
        ready = algorithm.prepare(changed, batch, jax.random.key(0)) if algorithm.prepare else batch
        terms, _ = algorithm.loss(changed, ready)
        return jnp.where(batch.mask, terms, 0.0).sum()

    mask = np.asarray(batch.mask)
    last = mask & (np.cumsum(mask[:, ::-1], axis=1)[:, ::-1] == 1)
    one = last & (np.arange(len(mask)) == mask.sum(axis=1).argmax())[:, None]  # of one completion
    draw = np.random.default_rng(1)
    near = np.asarray(logp) + draw.uniform(-0.04, -0.02, size=mask.shape)  # ratios below 1: some methods cap them there
    changed = np.stack([near, near + 0.01 * one, near + 0.01 * last])
    gradients = jax.vmap(jax.grad(total))(jnp.float32(changed))
    of_one, of_all = np.abs(np.asarray(gradients[1:]) - np.asarray(gradients[0])) > 1e-6
    if of_one[~one.any(axis=1)].any():
        return "group"
    if of_all[~last].any():
        return "sequence"
    if of_all.any():
        return "token"

    def has_these_advantages(**log_probs):
        moved = asked_for(algorithm, traj.replace(**log_probs))
        return np.allclose(algorithm.credit(moved, {}).advantages, batch.advantages)

    near = jnp.float32(near)
    reads_ratios = not has_these_advantages(old_logp=near) and has_these_advantages(old_logp=near, logp=near)
    return "in the advantage" if reads_ratios else "–"


# ------------------------------------------------------------------------------------------------------------- the page


def tree(found: list[Row]) -> str:
    """The methods as nested lists: what is learned, then what the gradient depends on."""
    branches: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in found:
        if row.learns.startswith("supervised"):
            trunk = "Imitation: the likelihood of demonstrations, or of chosen completions"
        elif row.critic:
            trunk = "Policy gradient with a critic"
        elif row.group:
            trunk = "Policy gradient without a critic, by comparison in the group of a prompt"
        else:
            trunk = "Policy gradient without a critic or a group"
        leaves = {"–": "no ratio", "in the advantage": "ratio in the advantages"}
        leaf = leaves.get(row.ratio, f"ratio of the {row.ratio}")
        branches[trunk][leaf].append(catalogue.link(row.name))
    branches["Values alone: actions are the best of Q"] = VALUES
    kinds = catalogue.SECTIONS
    for section in ("Preferences", "Distillation", "Reward models and supervised learning"):
        names = [catalogue.qualified_name(name) for name in kinds[section]]
        taken = {row.name for row in found}
        branches[f"{section}: objectives of their own"]["on pairs, labels or a teacher"] = [
            catalogue.link(name) for name in names if name in catalogue.methods() - taken
        ]
    lines = []
    for trunk, leaves in branches.items():
        lines.append(f"- **{trunk}**")
        lines += [f"  - {leaf}: {', '.join(names)}" for leaf, names in leaves.items()]
    return "\n".join(lines)


def page(ratios: dict[str, str]) -> str:
    found = rows(ratios)
    head = ("method", "samples", "critic", "group", "ratio", "KL", "weights")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for row in found:
        cells = (catalogue.link(row.name), row.samples, *("yes" if x else "–" for x in (row.critic, row.group)))
        lines.append(f"| {' | '.join([*cells, row.ratio, row.kl, f'`{row.weights}`'])} |")
    return "\n\n".join([INTRODUCTION, "## Tree", tree(found), "## Table", COLUMNS, "\n".join(lines)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(measured_ratios()), encoding="utf-8")
