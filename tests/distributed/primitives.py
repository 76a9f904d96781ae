"""Every function of rljax/train/distributed.py once, on each of the processes that a test starts. Prints "passed"."""

import sys

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rljax.train import distributed
from rljax.train.mesh import make_mesh, place, sharding_of

coordinator, processes, process = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
distributed.initialize(coordinator, processes, process, deadline_seconds=30, heartbeat_seconds=10)
assert (distributed.process_count(), distributed.process_index()) == (processes, process)
assert distributed.is_main() == (process == 0)

# Two rounds of one name, of values that are not arrays.
assert distributed.exchange("squares", {"square": process**2})[-1] == {"square": (processes - 1) ** 2}
assert distributed.exchange("squares", process) == list(range(processes))
assert distributed.on_main("who", lambda: f"process {distributed.process_index()}") == "process 0"
distributed.agree({"seed": 1})

# Five groups of unequal size, in no order: every row once, whole groups on one process, shares that differ by one.
group = np.array([7, 3, 3, 9, 7, 1, 4, 9, 9, 1, 7])
shares = distributed.exchange("shares", distributed.own_rows(group, process, processes).tolist())
assert sorted(row for rows in shares for row in rows) == list(range(len(group)))
owners = {number: {p for p, rows in enumerate(shares) for b in rows if group[b] == number} for number in group.tolist()}
assert all(len(of_group) == 1 for of_group in owners.values())
sizes = [len(set(group[rows].tolist())) for rows in shares]
assert max(sizes) - min(sizes) <= 1
judged = []
assert distributed.share_rows(lambda own: judged.extend(own.tolist()) or [f"row {b}" for b in own], group) == [
    f"row {b}" for b in range(len(group))
]
assert judged == shares[process]

# Arrays over all devices, rows over the first axis and over none; and a key, a number and numpy.
mesh = make_mesh(fsdp=-1)
rows = np.arange(24.0).reshape(8, 3)
tree = {"rows": rows, "step": 3, "key": jax.random.key(1)}
shardings = {name: jax.sharding.NamedSharding(mesh, P()) for name in tree} | {
    "rows": sharding_of(mesh, ("rows", None), rows.shape)
}
placed = place(tree, shardings)
assert placed["rows"].sharding.is_equivalent_to(shardings["rows"], 2)
assert len(placed["rows"].addressable_shards) == jax.local_device_count()
np.testing.assert_array_equal(distributed.fetch(placed["rows"] * 2), rows * 2)
assert int(placed["step"]) == 3
assert jax.random.key_data(placed["key"]).tolist() == jax.random.key_data(tree["key"]).tolist()
to_main = distributed.fetch_to_main(placed["rows"])
assert (to_main is None) == (process > 0)
assert not distributed.reached_preemption()

with pytest.raises(RuntimeError, match="the processes disagree: seed is 0 on process 0 and 1 on process 1") as refused:
    distributed.agree({"seed": process, "model": "m"})
assert "model" not in str(refused.value)
sys.stdout.write("passed\n")
