"""Multilayer perceptrons for control: actor and critic apart, discrete or continuous actions; and action values.

Weights begin as independent normals of variance 1/in (LeCun et al. 1998), times 0.01 in the policy's head, biases 0.
PPO's implementations take orthogonal ones of gain √2; docs/control.md has both measured.

A policy over continuous actions is a Gaussian with independent dimensions, its deviation the same in every state.
Environments clip actions to their bounds; log-probs are of the unclipped one.
"""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rljax.ops.kl import gaussian_entropy, gaussian_kl
from rljax.ops.logprobs import gaussian_logp, softmax, softmax_logp, token_statistics
from rljax.ops.sampling import argmax, invert_cdf
from rljax.ops.trust_region import directed_kl
from rljax.types import Params, PolicyOutput, Trajectory


def init_layers(key, sizes: tuple[int, ...], activation: Callable = jnp.tanh, last_gain: float = 1.0) -> list[dict]:
    """One {"w" [in out], "b" [out]} a layer, the last w times `last_gain`.

    Hidden layers also have "activation", which has no leaf.
    """
    layers = [
        {"w": shape[0] ** -0.5 * jax.random.normal(jax.random.fold_in(key, n), shape), "b": jnp.zeros(shape[1])}
        for n, shape in enumerate(pairwise(sizes))
    ]
    for layer in layers[:-1]:
        layer["activation"] = Partial(activation)
    layers[-1]["w"] *= last_gain
    return layers


def forward(layers: list[dict], x):
    """[.. D] -> [.. last size]. On two axes: CPU matmuls on three are slower."""
    out = x.reshape(-1, x.shape[-1])
    for layer in layers:
        out = out @ layer["w"] + layer["b"][None]
        out = layer["activation"](out) if "activation" in layer else out
    return out.reshape(*x.shape[:-1], -1)


def init(
    key, observation: int, actions: int, width: int = 64, continuous: bool = False, activation: Callable = jnp.tanh
) -> Params:
    """{"actor", "critic"}, two hidden layers each. `actions`: how many, or how many numbers an action has."""
    actor, critic = jax.random.split(key)
    heads = {"layers": init_layers(actor, (observation, width, width, actions), activation, last_gain=0.01)}
    if continuous:
        heads["log_std"] = jnp.zeros(actions)
    return {"actor": heads, "critic": init_layers(critic, (observation, width, width, 1), activation)}


def distribution(params: Params, observations):
    """Logits [.. A]; or (mean, deviation) [.. D] each."""
    actor = params["actor"]
    out = forward(actor["layers"], observations)
    if "log_std" not in actor:
        return out
    return out, jnp.broadcast_to(jnp.exp(actor["log_std"]), out.shape)


def values_of(params: Params, observations):
    """V [..]."""
    return forward(params["critic"], observations)[..., 0]


def act(params: Params, uniforms, observations) -> tuple:
    """Actions [B] or [B D] and their log-probs [B]: the distribution inverted at uniforms [B 1] or [B D]."""
    dist = distribution(params, observations)
    if isinstance(dist, tuple):
        mean, std = dist
        actions = mean + std * jax.scipy.special.ndtri(jnp.maximum(uniforms, 2.0**-24))
        return actions, gaussian_logp(mean, std, actions)
    dist = softmax(dist, jnp.ones(dist.shape[0]))
    actions = invert_cdf(dist.masses, uniforms[:, 0])
    return actions, softmax_logp(dist, actions)


def act_greedily(params: Params, uniforms, observations) -> tuple:
    """The likeliest actions; log-probs are 0."""
    dist = distribution(params, observations)
    actions = dist[0] if isinstance(dist, tuple) else dist.argmax(axis=-1)
    return actions, jnp.zeros(observations.shape[0])


def kl_of(old, new, kl_direction: str = "old_new"):
    """KL [..] of two of `distribution`, in either direction (`ops.trust_region.directed_kl`)."""
    if isinstance(new, tuple):
        return directed_kl(old, new, kl_direction, lambda p, q: gaussian_kl(*p, *q)).sum(axis=-1)
    return directed_kl(old, new, kl_direction)


def make_policy() -> Callable:
    """policy(params, frozen, trajectory) -> PolicyOutput. `frozen` may hold parts that stand still: the critic, say."""

    def policy(params: Params, frozen: Params, traj: Trajectory) -> PolicyOutput:
        params = {**frozen, **params}
        dist, values = distribution(params, traj.inputs), values_of(params, traj.inputs)
        kl = None if traj.dist is None else kl_of(traj.dist, dist)
        if isinstance(dist, tuple):
            mean, std = dist
            return PolicyOutput(gaussian_logp(mean, std, traj.actions), gaussian_entropy(std).sum(axis=-1), values, kl)
        logp, entropy, sum_pi_squared = token_statistics(dist, traj.actions, jnp.ones(traj.actions.shape))
        return PolicyOutput(logp, entropy, values, kl, sum_pi_squared)

    return policy


def make_divergence(kl_direction: str = "old_new") -> Callable:
    """divergence(params, old, frozen, trajectory) -> exact KL [B T] of `traj.dist` and the policy.

    By default KL(traj.dist ‖ policy): `traj.dist` stands for `old`, which is not computed again.
    """

    def divergence(params: Params, old: Params, frozen: Params, traj: Trajectory):
        return kl_of(traj.dist, distribution(params, traj.inputs), kl_direction)

    return divergence


def annotate(params: Params, traj: Trajectory) -> Trajectory:
    """The trajectory of an environment with values [B T+1], final_values and the distribution of these parameters.

    Actions came from it unless the actor lags behind. The last column of values is V of what the last decision led to.
    """
    final = values_of(params, traj.next_inputs)
    values = jnp.concatenate([values_of(params, traj.inputs), final[:, -1:]], axis=1)
    return traj.replace(values=values, final_values=final, dist=distribution(params, traj.inputs))


def init_q(key, observation: int, actions: int, widths: tuple[int, ...] = (120, 84)) -> list[dict]:
    """A network of action values, ReLU between its layers; widths and first weights are those of PureJaxRL's DQN."""
    return init_layers(key, (observation, *widths, actions), jax.nn.relu)


def action_values(params: list[dict], observations):
    """Q [.. A]."""
    return forward(params, observations)


def act_epsilon_greedily(params: tuple, uniforms, observations) -> tuple:
    """Of params (network, ε): a uniform action with probability ε, else the best one. Log-probs are not kept: 0."""
    network, epsilon = params
    q = action_values(network, observations)
    uniform, A = uniforms[:, 0], q.shape[1]
    explored = jnp.minimum((uniform / jnp.maximum(epsilon, 1e-8) * A).astype(jnp.int32), A - 1)
    return jnp.where(uniform < epsilon, explored, argmax(q)), jnp.zeros(uniform.shape)
