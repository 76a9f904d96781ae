"""Which processes belong together, and what each function does where there is one. Several: tests/distributed."""

import socket
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np
import pytest

from distributed.launch import free_port
from rljax.train import distributed
from rljax.train.mesh import make_mesh, place, sharding_of
from rljax.train.roll_call import Cluster, ProcessLostError, call_the_roll

VARIABLES = ("SLURM_", "OMPI_", "JAX_COORDINATOR", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "KUBERNETES_", "JOB_", "TPU_")
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "node[007-010],other",
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
}
JAX = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}


@pytest.fixture
def environ(monkeypatch):
    """Sets variables in an environment of no cluster."""
    for name in list(distributed.os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    return lambda variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, Cluster(f"node007:{12345 % 4096 + 65535 - 4096 + 1}", 16, 5)),
        ({**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, Cluster(f"10.96.0.1:{1531576320 // 4096 % 4096 + 65535 - 4096 + 1}", 8, 3)),
        (JAX, Cluster("host:1234", 4, 2)),
        ({**SLURM, **JAX}, Cluster("host:1234", 4, 2)),  # what is said goes before what is found
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a notebook in a pod of its own
    ],
    ids=["none", "slurm", "slurm-of-one", "open-mpi", "jax", "jax-in-slurm", "pod"],
)
def test_processes_are_found(variables, expected, environ):
    environ(variables)
    assert distributed.find_cluster() == expected
    assert distributed.find_cluster("a:1", 3, 0) == Cluster("a:1", 3, 0)
    assert distributed.find_cluster(processes=1) is None


@pytest.mark.parametrize("given", [("", 2, 0), ("host", 2, 0), ("host:1", 2, 2), ("host:1", 0, 0), ("host:1", 2, -1)])
def test_arguments_that_do_not_fit_together(given, environ):
    environ({})
    with pytest.raises(ValueError, match="legal: HOST:PORT of process 0"):
        distributed.find_cluster(*given)


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Failed to recognize coordinator address host-0", ProcessLostError),
        ("Retry failed with all attempts exhausted", ProcessLostError),
        ("Kubernetes API Error: 403 - Forbidden", RuntimeError),
    ],
)
def test_a_host_without_a_name_is_worth_a_new_start(message, kind, monkeypatch, environ):
    class Absent:
        get_process_count = staticmethod(lambda: 2)

        @staticmethod
        def get_coordinator_address(timeout_secs, override_coordinator_port):
            assert timeout_secs == 7
            raise RuntimeError(message)

    environ({})
    monkeypatch.setattr(distributed, "_environment", lambda: Absent)
    with pytest.raises(RuntimeError, match=message) as raised:
        distributed.find_cluster(deadline_seconds=7.0)
    assert type(raised.value) is kind


# ------------------------------------------------------------------------------------------------------------ roll call


def roll_call(*processes: int, count: int = 2, seconds: float = 1.0, port: int | None = None) -> list[Exception | None]:
    """What the roll call raises on each of these processes of `count`."""
    coordinator = f"127.0.0.1:{port or free_port()}"
    with ThreadPoolExecutor(len(processes)) as pool:
        calls = [pool.submit(call_the_roll, Cluster(coordinator, count, p), seconds) for p in processes]
        return [call.exception() for call in calls]


def test_all_have_come():
    assert roll_call(0, 2, 1, count=3, seconds=30.0) == [None] * 3


def test_who_does_not_come_is_named_by_all_who_did_and_worth_a_new_start():
    for error in roll_call(0, 2, count=4):
        assert type(error) is ProcessLostError
        assert str(error) == "processes 1, 3 of 4 did not come within 1 seconds"


def test_processes_that_were_numbered_wrongly_are_refused_for_good():
    for error in roll_call(0, 1, 1, count=3, seconds=30.0):
        assert type(error) is RuntimeError
        assert "two processes say that they are number 1 of 3" in str(error)


def test_a_port_that_is_taken_may_be_free_at_a_new_start():
    with socket.create_server(("", 0)) as taken:
        (error,) = roll_call(0, port=taken.getsockname()[1])
    assert type(error) is ProcessLostError
    assert "cannot listen on port" in str(error)


# What the coordinator of jaxlib 0.10.2 sends to whoever connects: the settings of HTTP/2.
COORDINATOR = bytes.fromhex("000018040000000000000400400000000500400000000600004000fe0300000001")


@pytest.mark.parametrize("answer", [COORDINATOR, b"HTTP/1.1 400 Bad Request\r\n", b"{}\n", b"[]\n"], ids=str)
def test_another_program_on_the_port_is_waited_for_until_the_deadline_and_then_named(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        (error,) = roll_call(1, port=server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert type(error) is ProcessLostError
    assert f"another program answers, with {answer[:24]!r}" in str(error)


def test_process_0_may_come_after_another_program_has_left_its_port():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:
        late = pool.submit(call_the_roll, Cluster(f"127.0.0.1:{port}", 2, 1), 30.0)
        with server.accept()[0] as connection:
            connection.recv(4096)
            connection.sendall(COORDINATOR)
        server.close()
        assert roll_call(0, port=port, seconds=30.0) == [None]
        assert late.exception() is None


# --------------------------------------------------------------------------------------------------------------- alone


def test_one_process_does_the_plain_thing(environ):
    environ({})
    distributed.initialize()
    assert (distributed.process_count(), distributed.process_index(), distributed.is_main()) == (1, 0, True)
    assert distributed.exchange("name", 3) == [3]
    assert distributed.on_main("name", lambda: 4) == 4
    distributed.agree({"seed": 1})
    assert not distributed.reached_preemption()
    assert distributed.share_rows(lambda own: own.tolist(), np.array([5, 1, 5])) == [0, 1, 2]
    tree = {"array": jnp.arange(3), "none": None}
    assert isinstance(distributed.fetch(tree)["array"], np.ndarray)
    np.testing.assert_array_equal(distributed.fetch_to_main(np.arange(6).reshape(2, 3), 1), [3, 4, 5])
    distributed.stop_others("nobody is there")


def test_what_was_fetched_does_not_stay_on_the_host():
    """JAX keeps the numpy copy of an array with it, so that a saved model would be there twice."""
    sharded = place(np.zeros((1024, 1024), np.float32), sharding_of(make_mesh(fsdp=8), ("embed", None), (1024, 1024)))
    tracemalloc.start()
    distributed.fetch_to_main(sharded)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 2**20 < 2**22 <= peak


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_every_row_is_judged_once_and_groups_stay_together(processes):
    group = np.random.default_rng(0).integers(0, 5, 40)
    shares = [distributed.own_rows(group, process, processes) for process in range(processes)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(40))
    groups = [set(group[rows].tolist()) for rows in shares]
    assert sum(map(len, groups)) == 5
    assert max(map(len, groups)) - min(map(len, groups)) <= 1
