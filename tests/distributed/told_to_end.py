"""A run of 100 empty steps in DIRECTORY. Its last process is told to end WHEN: around restore, or after a save."""

import argparse
import os
import signal
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from experiments.common import command_line
from rljax.train import distributed
from rljax.train.mesh import make_mesh, place
from rljax.train.run import Run
from rljax.types import TrainState

parser = argparse.ArgumentParser()
for name in ("directory", "when"):
    parser.add_argument(name)
parser.add_argument("--hosts.coordinator", default="")
parser.add_argument("--hosts.processes", default=1, type=int)
parser.add_argument("--hosts.process", default=-1, type=int)
directory, when, *hosts = vars(parser.parse_args()).values()


def be_told(now: str) -> None:
    if now == when and distributed.process_index() == distributed.process_count() - 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3.0)  # JAX looks for the signal once a second


command_line.configure_jax()
distributed.initialize(*hosts)
state = TrainState(step=0, params={"w": jnp.zeros(3)}, opt_state=(), key=jax.random.key(0))
state = place(state, NamedSharding(make_mesh(), PartitionSpec()))
with Run(directory, {}, steps=100, save_every=1 if when == "after a save" else 100) as run:
    be_told("before restore")
    state = run.restore(state)
    be_told("after restore")
    for step in run.steps(state.step):
        distributed.exchange("update", None)  # they wait for each other, as in the collectives of an update
        state = state.replace(step=step + 1)
        run.record(step, state, {"loss": 0.0})
        if run.is_first_step(step):
            be_told("after a save")
