"""Where arrays lie: the mesh, the rules, a whole state, rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from rljax.algorithms import grpo
from rljax.models import policy
from rljax.models.decoder import DecoderConfig
from rljax.models.moe import MoEConfig
from rljax.train.mesh import (
    AXES,
    RULES,
    data_parallel_size,
    hidden_sharding,
    make_mesh,
    param_shardings,
    shard_prompts,
    shard_rows,
    sharding_of,
    state_shardings,
)
from rljax.train.objective import policy_objective
from rljax.train.sharding_table import sharding_table
from rljax.train.update import make_update
from rljax.types import PromptBatch, TrainState
from tests.algorithms.tiny import credited, rollout

P = PartitionSpec


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (1, 8, 1, 1, 1)),
        ({"data": -1, "fsdp": 2, "tensor": 2}, (2, 2, 1, 1, 2)),
        ({"data": 2, "fsdp": 1, "tensor": -1}, (2, 1, 1, 1, 4)),
        ({"fsdp": 2, "sequence": -1, "expert": 2}, (1, 2, 2, 2, 1)),
    ],
)
def test_one_size_may_be_what_is_left(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape


def test_a_mesh_may_be_over_other_devices_than_those_that_are_here():
    devices = jax.devices()[2:6]
    assert list(make_mesh(fsdp=2, tensor=2, devices=devices).devices.flat) == devices
    with pytest.raises(ValueError, match="does not cover 4 devices"):
        make_mesh(fsdp=8, devices=devices)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """A chip, as a mesh is made of: 2 x 2 in each slice."""

    id: int
    is_here: bool = True  # False: of a topology that is only compiled for
    platform = "tpu"
    device_kind = "TPU v5 lite"
    core_on_chip = 0

    @property
    def process_index(self):
        return self.id // 4

    @property
    def slice_index(self):
        if not self.is_here:
            raise AttributeError
        return self.id // 4

    @property
    def coords(self):
        return (self.id % 2, self.id // 2 % 2, 0)


def test_data_alone_goes_over_several_slices_of_tpus():
    chips = [Tpu(i) for i in (7, 2, 0, 5, 6, 3, 1, 4)]
    for data, fsdp, tensor in ((2, -1, 1), (4, 2, 1), (2, 2, 2), (8, 1, 1)):
        mesh = make_mesh(data, fsdp, tensor, devices=chips)
        assert set(mesh.devices.flat) == set(chips)
        for part in np.split(mesh.devices, data):
            assert len({chip.slice_index for chip in part.flat}) == 1
    assert make_mesh(devices=chips[1:3] + chips[5:7]).shape["fsdp"] == 4  # one slice
    planned = [Tpu(i, is_here=False) for i in range(4)]
    assert make_mesh(devices=planned).shape["fsdp"] == 4  # chips of a topology do not say their slice
    for sizes in ({}, {"data": 1, "tensor": 4}):
        with pytest.raises(ValueError, match="mesh data = 1 on 2 TPU slices, between which only data goes"):
            make_mesh(**sizes, devices=chips)


@pytest.mark.parametrize("sizes", [(3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, -1, 1), (16, 1, 1), (-8, 1, -1)])
def test_a_mesh_that_does_not_cover_the_devices_is_refused_with_the_legal_sizes(sizes):
    with pytest.raises(ValueError, match=r"does not cover 8 devices; each size must be one of \[1, 2, 4, 8\]"):
        make_mesh(*sizes)


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("embed", "mlp"), (8, 12), P("fsdp", "tensor")),
        (("embed", "heads", None), (8, 4, 3), P("fsdp", "tensor", None)),
        (("embed", "kv_heads", None), (8, 3, 3), P("fsdp", None, None)),  # 3 heads over 2: whole
        (("vocabulary", None), (16, 8), P(("tensor", "fsdp"), None)),
        (("vocabulary", None), (6, 8), P("tensor", None)),  # 6 over 8 does not go, over 2 it does
        (("vocabulary", None), (7, 8), P(None, None)),
        ((None,), (8,), P(None)),
        (("unheard of",), (8,), P(None)),
        (("experts", "embed", "mlp"), (4, 8, 12), P(None, "fsdp", "tensor")),  # an axis of one device
    ],
)
def test_an_axis_that_does_not_divide_stays_whole(axes, shape, spec):
    sharding = sharding_of(make_mesh(1, 4, 2), axes, shape)
    whole = jax.sharding.NamedSharding(sharding.mesh, spec)
    assert sharding.is_equivalent_to(whole, len(shape))


PARAMS = {"table": jnp.zeros((16, 8)), "up": jnp.zeros((8, 12)), "scale": jnp.zeros(8)}
LOGICAL_AXES = {"table": ("vocabulary", None), "up": ("embed", "mlp"), "scale": (None,)}


def whole_state(optimizer):
    return TrainState(
        step=0,
        params=PARAMS,
        opt_state=optimizer.init(PARAMS),
        key=jax.random.key(0),
        frozen={"reference": {"up": PARAMS["up"]}, "other": jnp.zeros(8)},
        coefficients={"kl": jnp.float32(0)},
    )


def test_moments_and_reference_lie_as_the_parameters_do_and_the_rest_is_copied():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 10)))
    mesh = make_mesh(2, 2, 2)
    shardings = state_shardings(mesh, whole_state(optimizer), optimizer, LOGICAL_AXES)
    placed = param_shardings(mesh, LOGICAL_AXES, PARAMS)
    adam = shardings.state.opt_state[1][0]
    assert shardings.state.params == adam.mu == adam.nu == placed
    assert shardings.state.frozen["reference"] == {"up": placed["up"]}
    rest = (adam.count, shardings.state.frozen["other"], shardings.state.key, shardings.state.coefficients)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(rest))
    state = jax.device_put(whole_state(optimizer), shardings.state)
    assert state.params["up"].addressable_shards[0].data.shape == (4, 6)
    assert state.params["table"].addressable_shards[0].data.shape == (4, 8)


def test_statistics_of_another_shape_than_their_parameter_are_copied():
    """Adafactor keeps a row and a column of each matrix: the matrix's sharding would not fit them."""
    optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=2)
    state = whole_state(optimizer)
    for known in (state, jax.eval_shape(lambda: state)):
        shardings = state_shardings(make_mesh(2, 2, 2), known, optimizer, LOGICAL_AXES)
        placed = jax.device_put(state, shardings.state)
        assert not placed.params["up"].sharding.is_fully_replicated


def test_rows_go_over_data_and_fsdp_and_scalars_everywhere():
    shardings = state_shardings(make_mesh(2, 2, 2), whole_state(optax.sgd(1)), optax.sgd(1), LOGICAL_AXES)
    out = shard_rows(shardings, {"x": np.arange(24).reshape(8, 3), "absent": None, "scalar": np.float32(1)})
    assert [shard.data.shape for shard in out["x"].addressable_shards] == [(2, 3)] * 8
    assert out["scalar"].sharding.is_fully_replicated
    with pytest.raises(ValueError, match=r"6 rows .* over 4 devices \(data x fsdp x expert\); take a multiple of 4"):
        shard_rows(shardings, np.zeros((6, 2)))


def test_prompts_are_spread_and_their_columns_stay_on_the_host():
    shardings = state_shardings(make_mesh(8, 1, 1), whole_state(optax.sgd(1)), optax.sgd(1), LOGICAL_AXES)
    columns = [{"answer": i} for i in range(8)]
    rows = PromptBatch(np.zeros((8, 3), np.int32), np.ones((8, 3), bool), np.arange(8, dtype=np.int32), columns, 8)
    placed = shard_prompts(shardings, rows)
    assert placed.tokens.addressable_shards[0].data.shape == (1, 3)
    assert placed.columns is columns
    assert placed.cursor == 8


@pytest.mark.parametrize(("prompts", "spec"), [(8, (2, 3)), (2, (1, 3)), (3, (3, 3))])
def test_prompts_that_do_not_divide_are_copied(prompts, spec):
    """8 go over all 4 devices that have rows, 2 over the first mesh axis, 3 over none."""
    shardings = state_shardings(make_mesh(2, 2, 2), whole_state(optax.sgd(1)), optax.sgd(1), LOGICAL_AXES)
    tokens = np.arange(3 * prompts, dtype=np.int32).reshape(prompts, 3)
    rows = PromptBatch(tokens, tokens >= 0, tokens[:, 0], [{}] * prompts, prompts)
    placed = shard_prompts(shardings, rows)
    assert {shard.data.shape for shard in placed.tokens.addressable_shards} == {spec}
    np.testing.assert_array_equal(placed.tokens, tokens)


def test_who_has_rows():
    """Experts and rows share an axis; in a sampler the devices of a sequence have rows of their own."""
    mesh = make_mesh(1, 2, sequence=2, expert=2)
    assert data_parallel_size(mesh) == 4
    assert data_parallel_size(mesh, "rollout_rows") == 8
    assert set(RULES["rollout_rows"]) == {*RULES["rows"], *RULES["columns"]}
    sharding = hidden_sharding(mesh)
    assert sharding.shard_shape((8, 6, 5)) == (2, 3, 5)
    experts = sharding_of(mesh, ("experts", "embed", "mlp"), (4, 8, 12))
    assert experts.shard_shape((4, 8, 12)) == (2, 4, 12)


def test_on_one_device_nothing_is_constrained():
    assert hidden_sharding(make_mesh(1, 1, devices=jax.devices()[:1])) is None


def test_the_table_of_a_state():
    """By hand: bytes of each array, of its sums, and which mesh axes an axis goes over."""
    optimizer = optax.adam(1e-3)
    shardings = state_shardings(make_mesh(2, 2, 2), whole_state(optimizer), optimizer, LOGICAL_AXES)
    frozen_axes = {"reference": {"up": ("embed", "mlp")}, "other": (None,)}
    rows = sharding_table(whole_state(optimizer), shardings, {"params": LOGICAL_AXES, "frozen": frozen_axes})
    found = {row.pop("array"): row for row in rows}
    up = {"shape": "8 x 12", "dtype": "float32", "axes": "embed over fsdp, mlp over tensor", "bytes a device": 96}
    assert found["params/up"] == found["opt_state/0/mu/up"] == found["frozen/reference/up"] == up
    assert found["params/table"]["axes"] == "vocabulary over tensor x fsdp, -"
    assert found["params/table"]["bytes a device"] == 16 * 8 * 4 // 4
    assert found["params/scale"] == {"shape": "8", "dtype": "float32", "axes": "-", "bytes a device": 32}
    assert found["sum of params"]["bytes a device"] == 96 + 128 + 32
    assert found["sum of opt_state"]["bytes a device"] == 2 * (96 + 128 + 32) + 4  # and the count
    assert found["sum of frozen"]["bytes a device"] == 96 + 32
    assert found["sum of all"]["bytes a device"] == 256 + 516 + 128


MIXTURE = DecoderConfig(
    vocab_size=16,
    hidden_size=8,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    moe=MoEConfig(4, 2, 8, layers=(0,), norm_topk_prob=True),
)


def test_what_an_update_makes_lies_as_the_parameters_do():
    """Born so, and after an update: parameters, moments, and the gradient, which momentum of 0 shows."""
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    config = dataclasses.replace(MIXTURE, hidden_sharding=hidden_sharding(mesh))
    params = policy.init(MIXTURE, jax.random.key(0))
    axes = policy.logical_axes(config, params)
    params = jax.device_put(params, param_shardings(mesh, axes, params))
    optimizer = optax.chain(optax.trace(0.0), optax.adam(1e-3))
    state = TrainState(step=0, params=params, opt_state=optimizer.init(params), key=jax.random.key(0))
    shardings = state_shardings(mesh, state, optimizer, axes)
    up = shardings.state.params["decoder"]["layers"][0]["mlp"]["up"]
    assert up.spec == P("expert", "fsdp", "tensor")

    def assert_in_place(state):
        for name in ("params", "opt_state"):
            leaves = zip(
                jax.tree.leaves(getattr(state, name)), jax.tree.leaves(getattr(shardings.state, name)), strict=True
            )
            assert all(x.ndim == 0 or x.sharding.is_equivalent_to(place, x.ndim) for x, place in leaves)

    assert_in_place(state)  # `optimizer.init` puts moments where the parameters are
    algorithm = grpo()
    batch = credited(algorithm, rollout(vocabulary=16))
    update = make_update(policy_objective(policy.make_policy(config), algorithm), optimizer, 2, shardings)
    new, _ = update(jax.device_put(state, shardings.state), batch)
    assert_in_place(new)
    assert optax.tree.norm(new.opt_state[0].trace) > 0
