"""Every function of rljax/train/distributed.py once, on each of the processes that a test starts. Prints "passed"."""

import dataclasses
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments.common import models
from experiments.common.models import load_model, save_pretrained, trained_and_frozen, trained_config
from experiments.common.settings import Adapter, Weights
from rljax.models import decoder, hf
from rljax.train import distributed
from rljax.train.mesh import make_mesh, place, sharding_of
from tests.models import tiny

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

# A stacked parameter, sharded along its second axis, on devices and on hosts: whole, or one layer of it.
stacked = np.arange(2 * 24.0).reshape(2, 8, 3)
for kind in ("device", "pinned_host"):
    sharding = sharding_of(mesh, (None, "embed", None), stacked.shape).with_memory_kind(kind)
    on_devices = place(stacked, sharding)
    assert on_devices.sharding.memory_kind == kind
    for index in (None, 1):
        wanted = stacked if index is None else stacked[index]
        with mock.patch.object(jax, "device_put", wraps=jax.device_put) as put:
            to_main = distributed.fetch_to_main(on_devices, index)
        assert max(call.args[0].size for call in put.call_args_list) == wanted.size
        if process:
            assert to_main is None
        else:
            np.testing.assert_array_equal(to_main, wanted)

# A model with stacked layers over all devices is written as one on the host is.
root = Path(distributed.on_main("root", tempfile.mkdtemp))
made = distributed.on_main("made", lambda: str(tiny.make(root / "made", "moe_mixed")))
config = dataclasses.replace(hf.read_config(made), scan_layers=True)
params = load_model(made, mesh, "float32", scan_layers=True)[1]
save_pretrained(params, {}, config, made, root / "written")
adapted = trained_config(config, Weights(scan_layers=True, adapter=Adapter(rank=2)), mesh)
with mock.patch.object(models, "sign_of_life") as signs:
    save_pretrained(*trained_and_frozen(params, adapted, Weights()), adapted, made, root / "merged")
of_layers = jax.tree.leaves(decoder.abstract(dataclasses.replace(config, scan_layers=False)))
assert signs.call_count == len(of_layers)  # on every process, also where process 0 alone merges
if process == 0:
    hf.save(root / "wanted", config, hf.load(made, config), made)
    for file in (root / "wanted").iterdir():
        assert (root / "written" / file.name).read_bytes() == file.read_bytes()
        assert (root / "merged" / file.name).read_bytes() == file.read_bytes()  # a new adapter is zero
    shutil.rmtree(root)
assert not distributed.reached_preemption()

with pytest.raises(RuntimeError, match="the processes disagree: seed is 0 on process 0 and 1 on process 1") as refused:
    distributed.agree({"seed": process, "model": "m"})
assert "model" not in str(refused.value)
sys.stdout.write("passed\n")
