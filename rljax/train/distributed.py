"""Several processes that run one script: how they find each other, agree, share work on the host, and stop together.

Devices of all processes form one mesh, and every process runs the same program on its share of each array
(`jax.distributed`). What happens on the host is here: which rows a process judges (`share_rows`), arrays of all
processes as numpy (`fetch`), what process 0 alone does (`on_main`). With one process each of these is the plain thing.

Small messages go through the key-value store of JAX's coordinator rather than through device collectives: they have a
deadline, and a thread may send one while the devices work. JAX exports no handle of that store; Orbax takes it from
the same place.
"""

import atexit
import contextlib
import itertools
import os
import pickle
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from rljax.train.log import log_error, log_info, silence
from rljax.train.roll_call import Cluster, ProcessLostError, call_the_roll, processes_in_words
from rljax.types import Array

T = TypeVar("T")
EXCHANGE_SECONDS = 7200.0  # for the slowest process to come to an `exchange`
POLL_SECONDS = 1.0  # between two looks at whether another process failed
FAILED = "rljax/failed/"

_leaving = threading.Lock()
_over = threading.Event()  # this process is at its end
_rounds: Counter = Counter()  # how often there was an exchange of this name: the same on every process
_stopping_points = itertools.count(1)  # of `reached_preemption`


# ------------------------------------------------------------------------------------------------------------ beginning


def initialize(
    coordinator: str = "",
    processes: int = 0,
    process: int = -1,
    deadline_seconds: float = 300.0,
    heartbeat_seconds: int = 100,
) -> None:
    """Join the other processes of this run; nothing where there is only one. Call it before any device is used.

    Without arguments they are found: in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or else as JAX
    finds them under SLURM, Cloud TPU, GKE (indexed jobs, JobSet) and Open MPI.

    Args:
      coordinator: HOST:PORT of process 0. processes: how many there are; 1: this one alone, whatever is found.
      process: the number of this one, from 0.
      deadline_seconds: for all processes to come.
      heartbeat_seconds: after so long a silence of one process JAX ends the others (exit code 134).
    Raises ValueError for arguments that do not fit together; on every process ProcessLostError, saying who is missing,
    where not all of them came, and RuntimeError where they were told of different numbers.
    """
    found = find_cluster(coordinator, processes, process, deadline_seconds)
    if found is None:
        return
    if found.process:
        silence()
    call_the_roll(found, deadline_seconds)
    jax.distributed.initialize(
        *found,
        cluster_detection_method="deactivate" if _is_given(coordinator, processes, process) else None,
        initialization_timeout=int(deadline_seconds) + 1,
        heartbeat_timeout_seconds=heartbeat_seconds,
    )
    listener = threading.Thread(target=_stop_after_others, args=(distributed.global_state.client,), daemon=True)
    listener.start()
    atexit.register(_stop_listening, listener)  # runs before JAX's own, which ends the client
    log_info(f"{found.processes} processes, {jax.device_count()} devices")


def find_cluster(
    coordinator: str = "", processes: int = 0, process: int = -1, deadline_seconds: float = 300.0
) -> Cluster | None:
    """What is given, or else what is found (`initialize`); None for a single process.

    Raises ProcessLostError where the host of process 0 has no name by the deadline.
    """
    if processes == 1:
        return None
    if _is_given(coordinator, processes, process):
        return _given_cluster(coordinator, processes, process)
    environment = _environment()
    if environment is None or environment.get_process_count() == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        address = environment.get_coordinator_address(int(deadline_seconds), port)
    except RuntimeError as error:
        if NO_NAME.match(str(error)):
            raise ProcessLostError(f"process 0: {error}") from None
        raise
    return Cluster(address, environment.get_process_count(), environment.get_process_id())


def _is_given(coordinator: str, processes: int, process: int) -> bool:
    return bool(coordinator or processes or process >= 0 or os.environ.get("JAX_NUM_PROCESSES"))


def _given_cluster(coordinator: str, processes: int, process: int) -> Cluster | None:
    """The cluster of the arguments, and where one is missing of JAX's variables."""
    environ = os.environ
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS", "")
    processes = processes or int(environ.get("JAX_NUM_PROCESSES", 0))
    process = process if process >= 0 else int(environ.get("JAX_PROCESS_ID", -1))
    if processes == 1:
        return None
    _, colon, port = coordinator.rpartition(":")
    if not (colon and port.isdigit() and 0 <= process < processes):
        raise ValueError(
            f"coordinator {coordinator!r}, processes {processes}, process {process}; legal: HOST:PORT of process 0, "
            "how many processes there are, and the number of this one, from 0"
        )
    return Cluster(coordinator, processes, process)


def _environment() -> type[clusters.ClusterEnv] | None:
    """JAX's description of the cluster that started this process; None outside of one."""
    for kind in clusters.ClusterEnv._cluster_types:
        if kind.opt_in_only_method:
            continue
        if kind.__name__ == "K8sCluster" and "JOB_COMPLETION_INDEX" not in os.environ:
            continue  # a pod of its own: JAX would ask Kubernetes for a job that does not exist
        if kind.is_env_present():
            return kind
    return None


# ------------------------------------------------------------------------------------------------------------- messages


def process_count() -> int:
    """How many processes run this script; does not start the devices."""
    return distributed.global_state.num_processes or 1


def process_index() -> int:
    """The number of this process; does not start the devices."""
    return distributed.global_state.process_id or 0


def is_main() -> bool:
    """Whether this is process 0, which alone writes logs and files that are not checkpoints."""
    return process_index() == 0


def exchange(name: str, value: T, deadline_seconds: float = EXCHANGE_SECONDS) -> list[T]:
    """The value of every process, in their order. All processes exchange the same names in the same order.

    Raises ProcessLostError, naming who is missing, where one does not come in time.
    """
    if process_count() == 1:
        return [value]
    client = distributed.global_state.client
    own = process_index()
    key = f"rljax/{name}/{_rounds[name]}"
    client.key_value_set_bytes(f"{key}/{own}", pickle.dumps(value))
    try:
        client.wait_at_barrier(key, round(1000 * deadline_seconds))
    except jax.errors.JaxRuntimeError as error:
        here = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get_bytes(f"{key}/")}
        missing = sorted(set(range(process_count())) - here)
        who = f"{processes_in_words(missing)} did not come" if missing else str(error)
        raise ProcessLostError(f"{name}: {who} ({deadline_seconds:g} seconds)") from None
    values = dict(client.key_value_dir_get_bytes(f"{key}/"))
    if _rounds[name]:  # who has come to this round has read the one before
        client.key_value_delete(f"rljax/{name}/{_rounds[name] - 1}/{own}")
    _rounds[name] += 1
    return [pickle.loads(values[f"{key}/{process}"]) for process in range(process_count())]


def on_main(name: str, call: Callable[[], T]) -> T:
    """What `call` returns on process 0, where alone it runs; the others wait for it."""
    return exchange(name, call() if is_main() else None)[0]


def agree(facts: Mapping[str, Any]) -> None:
    """Raise RuntimeError on every process where a fact is another on one of them, naming it and both values."""
    everyone = exchange("facts", dict(facts))
    different = [
        f"{name} is {everyone[0].get(name)!r} on process 0 and {theirs.get(name)!r} on process {process}"
        for process, theirs in enumerate(everyone)
        for name in sorted(everyone[0].keys() | theirs.keys())
        if everyone[0].get(name) != theirs.get(name)
    ]
    if different:
        more = f"; and {len(different) - 5} more" if len(different) > 5 else ""
        raise RuntimeError(f"the processes disagree: {'; '.join(different[:5])}{more}. Legal: the same on all")


# ----------------------------------------------------------------------------------------------------------------- rows


def fetch(tree: Any) -> Any:
    """The tree with its arrays as numpy, whole on every process. All processes call it."""
    if process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(_fetch_array, tree)


def fetch_to_main(x: Any, index: int | None = None) -> np.ndarray | None:
    """An array as numpy on process 0, or what is at this index of its first axis; None elsewhere. All call it.

    A device receives no more than what is fetched, and JAX keeps no copy of it on the host.
    """
    if not isinstance(x, jax.Array):
        return np.asarray(x if index is None else x[index]) if is_main() else None
    if index is not None:
        x = _take(x, index, _without_first_axis(x.sharding))
    if not x.is_fully_addressable:
        x = jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
        x = jax.block_until_ready(x).addressable_data(0)
    if not is_main():
        return None
    shards = [shard.data for shard in x.addressable_shards]
    return np.asarray(jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards))


@partial(jax.jit, static_argnames="sharding")
def _take(x: Array, index: int, sharding: NamedSharding | None) -> Array:
    """What is at this index of the first axis, in the devices' memory."""
    taken = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    taken = jax.device_put(taken, jax.memory.Space.Device)
    return taken if sharding is None else jax.lax.with_sharding_constraint(taken, sharding)


def _without_first_axis(sharding: jax.sharding.Sharding) -> NamedSharding | None:
    """How an array's entries along its first axis are sharded; None on one device."""
    if not isinstance(sharding, NamedSharding):
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))


def _fetch_array(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if x.is_fully_addressable or x.is_fully_replicated:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


def share_rows(judge: Callable[[np.ndarray], Sequence[T]], group: Array, name: str = "rows") -> list[T]:
    """The results of all rows, in order, each from the process that judged it.

    Every process judges the rows of its share of the groups: whole groups, as even as they divide, in the order of
    their numbers, whichever devices hold the rows.

    Args:
      judge: indices of rows -> a result for each. group: [B] which rows belong together.
    """
    group = np.asarray(group)
    own = own_rows(group, process_index(), process_count())
    results: list[Any] = [None] * len(group)
    for rows, found in exchange(name, (own, list(judge(own)))):
        for row, result in zip(rows.tolist(), found, strict=True):
            results[row] = result
    return results


def own_rows(group: np.ndarray, process: int, processes: int) -> np.ndarray:
    """Indices of the rows that this process judges: those of its share of the groups."""
    numbers, which = np.unique(group, return_inverse=True)
    share = np.array_split(np.arange(len(numbers)), processes)[process]
    return np.flatnonzero(np.isin(which, share))


# ------------------------------------------------------------------------------------------------------------- the end


def reached_preemption() -> bool:
    """Whether to save and stop now: some process was told to end (SIGTERM, or the cloud's notice).

    True of the same call on every process. All call it where they can stop, equally often: before the first step and
    after each. False with one process.
    """
    # JAX waits for one number: one more than the last that any process gave it before it heard of the signal, or 1
    # where none did. So nothing else may ask it, and steps would not do: a run resumed at step 100 never comes to 1.
    return process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(_stopping_points))


NO_NAME = re.compile("Failed to recognize coordinator address|Retry failed")  # of JAX's messages, see `find_cluster`
LOST = re.compile(r"(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): |.*(Gloo|NCCL)")  # of JAX's messages


def is_lost_process(error: Exception) -> bool:
    """Whether the error says that another process is gone: a collective or a message had no other end."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        return process_count() > 1 and LOST.match(str(error)) is not None
    return isinstance(error, ProcessLostError)


def wait_for_reason() -> None:
    """Time for `_stop_after_others`, which ends this process where the one that is lost had said why."""
    time.sleep(2.5 * POLL_SECONDS)


def stop_others(problem: str) -> None:
    """Tell the other processes why this one stops, and end this process with exit code 1; nothing if it is alone.

    They would wait for it in a collective. Each prints the problem and ends within a few seconds.
    """
    if process_count() == 1:
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.key_value_set(f"{FAILED}{process_index()}", problem)
    leave(1)


def _stop_listening(listener: threading.Thread) -> None:
    _over.set()
    listener.join()


def _stop_after_others(client: Any) -> None:
    """A thread: end this process once another one has failed."""
    while not _over.wait(POLL_SECONDS):
        try:
            failed = client.key_value_dir_get(FAILED)
        except jax.errors.JaxRuntimeError:  # the run is over
            return
        failures = {int(path.rpartition("/")[2]): problem for path, problem in failed}
        if process_index() in failures:
            return
        if failures:
            process = min(failures)
            log_error(f"process {process} stopped: {failures[process]}")
            leave(1)


def leave(code: int) -> None:
    """End this process without waiting for others that are gone: JAX would, at a normal exit."""
    _leaving.acquire()  # for good: the first thread that wants to end the process says with which code
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():  # the store ends with it: the others read there why they are to end
        time.sleep(4 * POLL_SECONDS)
    os._exit(code)
