"""experiments/grpo.py as a test starts it: with a verifier that tells completions apart, and a record of every draw.

DIRECTORY/draws/STEP.npz holds the completions of a step, all rows, and how near each draw came to a boundary of the
cumulative distribution. RLJAX_TEST_HANG=PROCESS:STEP makes one process hang in a step, RLJAX_TEST_NAP=SECONDS makes
steps slow enough to be interrupted, RLJAX_TEST_OTHER=PROCESS:CODE runs a line of Python on one process first.
"""

import os
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
from scipy.special import softmax

from experiments import grpo
from experiments.common import command_line, sampling
from rljax.ops.sampling import row_keys, token_uniforms
from rljax.rollouts.sampler import bind_params
from rljax.train import distributed
from tests.rewards.hostile import share_of

sample = sampling.sample


@partial(jax.jit, static_argnames="lm")
def logits_of(lm, params, frozen, traj):
    lm = bind_params(lm, params, frozen)
    hidden, _ = lm.forward(traj.inputs, traj.positions, traj.segments, lm.init_cache(*traj.inputs.shape))
    return lm.logits(hidden)


def margins(lm, params, frozen, prompts, options, seed, step, traj) -> np.ndarray:
    """[B N] distance of each uniform number to the nearest boundary between two tokens, in float64."""
    number = np.repeat(distributed.fetch(prompts.number), options.n)
    keys = row_keys(seed, step, number, np.tile(np.arange(options.n, dtype=np.int32), len(number) // options.n))
    uniform = jax.vmap(lambda t: token_uniforms(keys, t), out_axes=1)(np.arange(options.max_tokens))
    logits = np.float64(distributed.fetch(logits_of(lm, params, frozen, traj)))[:, -options.max_tokens :]
    boundaries = np.cumsum(softmax(logits, axis=-1), axis=-1)[..., :-1]
    return np.abs(boundaries - np.float64(uniform)[..., None]).min(axis=-1)


def recorded(directory: Path):
    """The sampler that keeps what it drew."""

    def sample_and_keep(lm, params, frozen, prompts, options, seed, step):
        process, _, hangs_at = os.environ.get("RLJAX_TEST_HANG", "").partition(":")
        if process == str(distributed.process_index()) and hangs_at == str(step):
            time.sleep(3600)
        time.sleep(float(os.environ.get("RLJAX_TEST_NAP", 0)))
        traj = sample(lm, params, frozen, prompts, options, seed, step)
        rows = distributed.fetch({name: getattr(traj, name) for name in ("group", "actions", "mask", "logp")})
        rows["margin"] = margins(lm, params, frozen, prompts, options, seed, step, traj)
        if distributed.is_main():
            (directory / "draws").mkdir(parents=True, exist_ok=True)
            np.savez(directory / "draws" / f"{step}.npz", **rows)
        return traj

    return sample_and_keep


def main(cfg: grpo.Config):
    sampling.sample = recorded(Path(cfg.directory))
    return grpo.main(cfg, verifiers={"share": share_of})


if __name__ == "__main__":
    own, _, line = os.environ.get("RLJAX_TEST_OTHER", "").partition(":")
    if f"--hosts.process {own}" in " ".join(sys.argv):
        exec(line)
    command_line.run(grpo.Config, main)
