"""Q-learning, SARSA, expected SARSA and double Q-learning on tables, each run one compiled function.

    Q(s, a) += α_t · error        α_t = alpha / N(s, a)^power

power 0 is a fixed step, power 1 with alpha 1 the average of all targets. N counts updates of the table at hand. The
errors are those of `ops.q_learning`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rljax.envs.env import Env
from rljax.ops import q_learning as ops


class Hyper(NamedTuple):
    """Traced: other values need no other compilation."""

    alpha: float = 0.5
    power: float = 0.0
    epsilon: float = 0.3
    gamma: float = 0.9


class Learnt(NamedTuple):
    """After a run on S states with A actions."""

    q: jax.Array  # [S A]
    visits: jax.Array  # [S A]
    distance: jax.Array  # [steps] max |Q - truth| after each


def epsilon_greedy(q, epsilon):
    """Probabilities [A] of the policy; the first of equally good actions is the greedy one."""
    A = q.shape[-1]
    return epsilon / A + (1.0 - epsilon) * jax.nn.one_hot(jnp.argmax(q), A)


# (tables [2 S A], coin, s, a, r, discount, s', a', ε) -> TD error of the table that `coin` names; all but one know one
RULES: dict[str, Callable] = {
    "q_learning": lambda t, i, s, a, r, d, s2, a2, eps: ops.q_learning(t[0, s], a, r, d, t[0, s2]),
    "sarsa": lambda t, i, s, a, r, d, s2, a2, eps: ops.sarsa(t[0, s], a, r, d, t[0, s2], a2),
    "expected_sarsa": lambda t, i, s, a, r, d, s2, a2, eps: ops.expected_sarsa(
        t[0, s], a, r, d, t[0, s2], epsilon_greedy(t[0, s2], eps)
    ),
    "double_q": lambda t, i, s, a, r, d, s2, a2, eps: ops.double_q_learning(t[i, s], a, r, d, t[1 - i, s2], t[i, s2]),
}


def make_learn(rule: str, env: Env, states: int, steps: int) -> Callable:
    """learn(key, hyper, truth [S A]) -> Learnt. `env` observes the number of its state.

    The next action is drawn before the update, as SARSA needs it. Double Q-learning acts by the mean of its tables.
    """
    double = rule == "double_q"

    def learn(key, hyper: Hyper, truth) -> Learnt:
        def choose(key, tables, s):
            q = tables.mean(axis=0) if double else tables[0]
            return jax.random.categorical(key, jnp.log(epsilon_greedy(q[s], hyper.epsilon)))

        def one(carry, key):
            tables, visits, s, state, a = carry
            stepping, acting, resetting, beginning, tossing = jax.random.split(key, 5)
            out = env.step(stepping, state, a, env.params)
            following = choose(acting, tables, out.observation)
            coin = jax.random.randint(tossing, (), 0, 2) if double else 0
            discount = jnp.where(out.terminated, 0.0, hyper.gamma)
            error = RULES[rule](tables, coin, s, a, out.reward, discount, out.observation, following, hyper.epsilon)
            visits = visits.at[coin, s, a].add(1)
            tables = tables.at[coin, s, a].add(hyper.alpha / visits[coin, s, a] ** hyper.power * error)

            fresh, fresh_state = env.reset(resetting, env.params)
            first = choose(beginning, tables, fresh)
            ended = out.terminated | out.truncated
            s, state, a = jax.tree.map(
                lambda x, y: jnp.where(ended, x, y),
                (fresh, fresh_state, first),
                (out.observation, out.state, following),
            )
            q = tables.mean(axis=0) if double else tables[0]
            return (tables, visits, s, state, a), jnp.abs(q - truth).max()

        resetting, acting, key = jax.random.split(key, 3)
        tables = jnp.zeros((2, states, env.actions))
        s, state = env.reset(resetting, env.params)
        start = (tables, jnp.zeros(tables.shape, jnp.int32), s, state, choose(acting, tables, s))
        (tables, visits, *_), distance = jax.lax.scan(one, start, jax.random.split(key, steps))
        return Learnt(tables.mean(axis=0) if double else tables[0], visits.sum(axis=0), distance)

    return learn
