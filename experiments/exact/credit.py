"""How well does the credit of a decision agree with its exact advantage A(s, a) = Q(s, a) - V(s)?

Correlations over the exact distribution of visited prefixes and tokens: `one` of the credit as a single rollout gives
it, `mean` of its average given (s, a). High `mean` and low `one`: right, but noisy. Low `mean`: wrong however much is
averaged.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from exact.language import Tree, at_the_end, log_prob, values
from exact.worlds import World, facts
from rljax.algorithms.grpo import grpo
from rljax.algorithms.reinforce import leave_one_out_baseline, reinforce
from rljax.ops.returns import discounted_returns, gae

SEEDS = 50  # of noisy and of learned critics; figures are means over them
jitted_gae = jax.jit(gae)


class Visited:
    """Exact weights, advantages and rewards of every decision of every answer."""

    def __init__(self, lm: Tree, world: World):
        self.lm, self.world = lm, world
        self.chance = np.asarray(jnp.exp(log_prob(lm, world.policy)))  # [N]
        self.rewards = np.asarray(world.rewards)
        self.paid = at_the_end(lm, world.rewards)
        self.V = np.asarray(values(lm, world.policy, self.paid))
        self.place = lm.prefix * lm.vocabulary + lm.actions  # [N T] number of (s, a)
        mass = self.chance[:, None] * lm.mask
        count = np.bincount(self.place.ravel(), mass.ravel())
        Q = np.bincount(self.place.ravel(), (mass * self.rewards[:, None]).ravel()) / np.maximum(count, 1e-300)
        self.A = np.where(lm.mask, Q[self.place] - self.V[lm.prefix], 0.0)  # [N T]
        second = np.bincount(self.place.ravel(), (mass * self.rewards[:, None] ** 2).ravel()) / np.maximum(
            count, 1e-300
        )
        self.left = np.where(lm.mask, (second - Q**2)[self.place], 0.0)  # variance of what is paid after (s, a)

    def agreement(self, credit, rows=None, chance=None, noise=0.0) -> dict[str, float]:
        """Correlations of credit [M T] with A; row m is answer rows[m], seen with probability chance[m].

        `noise` is variance that the credit has beyond what its table shows.
        """
        rows = np.arange(len(self.chance)) if rows is None else rows
        mass = ((self.chance if chance is None else chance)[:, None] * self.lm.mask[rows]).ravel()
        credit = np.where(self.lm.mask[rows], np.asarray(credit), 0.0).ravel()
        place, A = self.place[rows].ravel(), self.A[rows].ravel()
        average = np.bincount(place, mass * credit) / np.maximum(np.bincount(place, mass), 1e-300)

        def covariance(x, y):
            return mass @ (x * y) / mass.sum() - (mass @ x) * (mass @ y) / mass.sum() ** 2

        def correlation(x, more=0.0):
            return covariance(x, A) / np.sqrt(max((covariance(x, x) + more) * covariance(A, A), 1e-300))

        return {"one": correlation(credit, noise), "mean": correlation(average[place])}

    def of_groups(self, algorithm, answers: int) -> dict[str, float]:
        """The credit that `algorithm` gives the first answer of a group."""
        rows = np.array(list(itertools.product(range(len(self.chance)), repeat=answers)))
        traj = facts(self.lm, self.world, algorithm.needs)
        one = lambda group: algorithm.credit(jax.tree.map(lambda x: x[group], traj), {}).advantages[0]  # noqa: E731
        credit = jax.jit(jax.vmap(one))(jnp.asarray(rows))
        return self.agreement(credit, rows[:, 0], self.chance[rows].prod(1))

    def of_critic(self, V, lam: float) -> dict[str, float]:
        """GAE with the values V [S]."""
        V = jnp.pad(jnp.where(self.lm.mask, jnp.asarray(V)[self.lm.prefix], 0.0), ((0, 0), (0, 1)))
        return self.agreement(jitted_gae(self.paid, V, jnp.asarray(self.lm.mask), 1.0, lam))

    def of_prefix_rollouts(self, count: int) -> dict[str, float]:
        """VinePPO (arXiv:2410.01679): V of each prefix is the mean reward of `count` fresh answers from it. In closed
        form: the mean is A, and both prefixes of a decision add the variance of what is paid after them over `count`.
        """
        mask, mass = self.lm.mask, self.chance[:, None] * self.lm.mask
        square = np.asarray(values(self.lm, self.world.policy, self.paid**2)) - self.V**2  # of what is paid, by prefix
        noise = (mass * (square[self.lm.prefix] + self.left)).sum() / mass.sum() / count
        return self.agreement(np.where(mask, self.A, 0.0), noise=noise)

    def drawn(self, seed: int, count: int) -> np.ndarray:
        return np.random.default_rng(seed).choice(len(self.chance), size=count, p=self.chance / self.chance.sum())

    def averaged(self, seed: int, count: int) -> np.ndarray:
        """A critic fitted to `count` answers: mean reward after each prefix, of all answers where it was not seen."""
        rows = self.drawn(seed, count)
        at, paid = self.lm.prefix[rows][self.lm.mask[rows]], np.repeat(self.rewards[rows], self.lm.mask[rows].sum(1))
        seen = np.bincount(at, minlength=self.lm.prefixes)
        total = np.bincount(at, paid, minlength=self.lm.prefixes)
        return np.where(seen > 0, total / np.maximum(seen, 1), self.rewards[rows].mean())

    def by_differences(self, seed: int, count: int, rate: float = 0.1) -> np.ndarray:
        """A critic after one pass of TD(0) over `count` answers, from 0."""
        V = np.zeros(self.lm.prefixes)
        for row in self.drawn(seed, count):
            path = self.lm.prefix[row][self.lm.mask[row]]
            for here, after in zip(path, [*path[1:], None], strict=True):
                V[here] += rate * ((self.rewards[row] if after is None else V[after]) - V[here])
        return V


def over_seeds(results: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([r[name] for r in results])) for name in results[0]}


def by_outcome(lm: Tree, world: World) -> dict[str, dict[str, float]]:
    """Credits without a critic."""
    seen, mask = Visited(lm, world), jnp.asarray(lm.mask)
    R, n = seen.rewards[:, None] + 0.0 * lm.mask, lm.mask.sum(1, keepdims=True)
    by_reference = np.asarray(values(lm, world.reference, seen.paid))[lm.prefix]
    rows = {"reward of the answer": seen.agreement(R), "reward spread evenly over the tokens": seen.agreement(R / n)}
    for answers in (2, 3):
        rows |= {
            f"reward - group mean, of {answers}": seen.of_groups(grpo(std_epsilon=None), answers),
            f"reward - mean of the others, of {answers}": seen.of_groups(reinforce(leave_one_out_baseline), answers),
            f"GRPO (group's std too), of {answers}": seen.of_groups(grpo(), answers),
        }
    rows["this and later step rewards, arbitrary"] = seen.agreement(discounted_returns(world.steps, mask))
    rows["this and later step rewards, from the reference's values"] = seen.agreement(R - by_reference)
    rows["step reward alone, from the reference's values"] = seen.of_critic(values(lm, world.reference, seen.paid), 0.0)
    for count in (1, 4, 16, 64):
        rows[f"{count} fresh answers from each prefix (VinePPO)"] = seen.of_prefix_rollouts(count)
    return rows


def by_critic(lm: Tree, world: World, lambdas=(0.0, 0.95, 1.0)) -> dict[str, dict[float, dict[str, float]]]:
    """GAE, by critic and λ."""
    seen = Visited(lm, world)
    spread = np.sqrt(seen.chance @ seen.rewards**2 - (seen.chance @ seen.rewards) ** 2)
    error = np.random.default_rng(0).normal(size=(SEEDS, lm.prefixes)) * spread
    critics = {"exact": [seen.V], "none (0)": [0 * seen.V], "exact + error of ½ std of R": seen.V + 0.5 * error}
    critics["exact + error of 1 std of R"] = seen.V + error
    for count in (16, 256):
        critics[f"means after {count} answers"] = [seen.averaged(seed, count) for seed in range(SEEDS)]
        critics[f"TD(0), rate 0.1, {count} answers"] = [seen.by_differences(seed, count) for seed in range(SEEDS)]
    return {
        name: {lam: over_seeds([seen.of_critic(V, lam) for V in Vs]) for lam in lambdas} for name, Vs in critics.items()
    }
