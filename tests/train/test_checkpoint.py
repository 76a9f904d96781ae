"""Checkpoints: the whole state to the last bit, on any mesh; damage is seen, said and survived."""

import hashlib
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from orbax.checkpoint import CheckpointManager

from rljax.models import decoder
from rljax.train.checkpoint import Checkpoints, restore_items
from rljax.train.mesh import make_mesh, state_shardings
from rljax.types import TrainState

CONFIG = decoder.DecoderConfig(
    vocab_size=16, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=16
)
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(1e-3, 0, 10)))
EMPTY = {}
FULL = {
    "frozen": {"reference": {"scale": jnp.full(8, 1.5, jnp.bfloat16)}},
    "coefficients": {"kl": jnp.float32(0.04)},
    "extra": {"buffer": jnp.arange(6, dtype=jnp.uint8), "env": (jax.random.key(9), jnp.array([True, False]))},
}


def whole_state(seed, **fields):
    params = {"decoder": decoder.init(CONFIG, jax.random.key(seed)), "odd": jnp.array([jnp.nan, -0.0, 1e-45])}
    opt_state = jax.tree.map(lambda x: x + seed, OPTIMIZER.init(params))
    key = jax.random.fold_in(jax.random.key(7), seed)
    return TrainState(step=seed, params=params, opt_state=opt_state, key=key, cursor=100 * seed, **fields)


@pytest.fixture(scope="module")
def small():
    """A state of two numbers, to save often."""
    return lambda step: TrainState(
        step=step, params={"w": jnp.full(3, float(step))}, opt_state=(), key=jax.random.key(step)
    )


def bits(state):
    def raw(x):
        x = jnp.asarray(x)
        x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return {jax.tree_util.keystr(path): raw(x) for path, x in jax.tree.leaves_with_path(state)}


def files(directory):
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(directory.rglob("*"))
        if f.is_file()
    }


def saved(directory, states, **options):
    checkpoints = Checkpoints(directory, **options)
    for state in states:
        checkpoints.save(int(state.step), state)
    checkpoints.close()
    return directory


def restored(directory, template, **options):
    checkpoints = Checkpoints(directory, **options)
    try:
        return checkpoints.restore(template)
    finally:
        checkpoints.close()


@pytest.mark.parametrize("fields", [EMPTY, FULL], ids=["nothing optional", "everything"])
def test_a_state_comes_back_to_the_last_bit(tmp_path, fields):
    state = whole_state(3, **fields)
    other = jax.tree.map(jnp.copy, whole_state(0, **fields)).replace(key=jax.random.key(0))
    back = restored(saved(tmp_path, [state]), other)
    assert bits(back) == bits(state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert jax.random.uniform(back.key) == jax.random.uniform(state.key)


def test_a_state_comes_back_onto_another_mesh(tmp_path):
    state = whole_state(2)
    axes = {"decoder": decoder.param_axes(CONFIG), "odd": (None,)}
    first, second = (state_shardings(make_mesh(*s), state, OPTIMIZER, axes).state for s in [(1, 8, 1), (2, 2, 2)])
    state = jax.device_put(state, first)
    back = restored(saved(tmp_path, [state]), jax.device_put(whole_state(0), second))
    assert bits(back) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, (back.params, back.opt_state)) == (second.params, second.opt_state)
    assert not back.params["decoder"]["embedding"].sharding.is_fully_replicated


def test_without_a_checkpoint_there_is_nothing_to_restore(tmp_path, small):
    assert restored(tmp_path / "new", small(0)) is None


def test_the_newest_is_restored_and_only_the_newest_are_kept(tmp_path, small):
    saved(tmp_path, [small(step) for step in (1, 2, 3, 4)], keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "3.sha256.json", "4", "4.sha256.json"]
    assert restored(tmp_path, small(0)).params["w"][0] == 4


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path, small):
    state, checkpoints = small(1), Checkpoints(tmp_path)
    checkpoints.save(1, state)
    state.params["w"].delete()
    assert checkpoints.restore(small(0)).params["w"][0] == 1  # restore waits for what is being saved
    checkpoints.close()


def largest(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def flip_a_byte(step):
    file = largest(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut_short(step):
    file = largest(step)
    file.write_bytes(file.read_bytes()[:-1])


def lose_a_file(step):
    largest(step).unlink()


def add_a_file(step):
    (step / "stray").write_text("?")


def spoil_the_manifest(step):
    step.with_name(f"{step.name}.sha256.json").write_text('{"half')


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, lose_a_file, add_a_file, spoil_the_manifest])
def test_damage_to_the_newest_is_said_and_the_one_before_is_taken(tmp_path, small, damage):
    saved(tmp_path, [small(1), small(2)])
    damage(tmp_path / "2")
    said = []
    before = files(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, log_info=said.append)
    assert checkpoints.restore(small(0)).params["w"][0] == 1
    assert said[0].startswith("checkpoint 2 is damaged (")
    assert said[0].endswith("); falling back to the one before")
    assert said[1:] == [f"checkpoint 2 is kept as {tmp_path}/2.damaged: remove it when you no longer want it"]
    assert before.items() <= files(tmp_path / "2.damaged").items()  # it was perhaps unreadable for a moment only
    checkpoints.save(2, small(2).replace(params={"w": jnp.full(3, 22.0)}))  # the run goes on and saves again
    checkpoints.close()
    assert restored(tmp_path, small(0)).params["w"][0] == 22


def test_if_all_are_damaged_nothing_is_started_over_and_nothing_deleted(tmp_path, small):
    saved(tmp_path, [small(1), small(2)])
    for step in ("1", "2"):
        flip_a_byte(tmp_path / step)
    before = files(tmp_path)
    with pytest.raises(RuntimeError, match="all checkpoints are damaged; move the run away to start over"):
        restored(tmp_path, small(0))
    assert files(tmp_path) == before


def test_what_was_committed_without_a_manifest_is_restored_and_gets_one(tmp_path, small):
    """And what was not committed is removed."""
    saved(tmp_path, [small(1), small(2)])
    manifest = (tmp_path / "2.sha256.json").read_text()
    (tmp_path / "2.sha256.json").unlink()
    (tmp_path / "3.orbax-checkpoint-tmp-5").mkdir()
    said = []
    assert restored(tmp_path, small(0), log_info=said.append).params["w"][0] == 2
    assert [line.partition(":")[0].removeprefix(f"removing {tmp_path}/") for line in said] == [
        "3.orbax-checkpoint-tmp-5",
        "checkpoint 2 has no manifest",
    ]
    assert (tmp_path / "2.sha256.json").read_text() == manifest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.sha256.json", "2", "2.sha256.json"]


def test_what_has_no_manifest_and_cannot_be_read_is_damaged(tmp_path, small):
    saved(tmp_path, [small(1), small(2)])
    (tmp_path / "2.sha256.json").unlink()
    cut_short(tmp_path / "2")
    said = []
    assert restored(tmp_path, small(0), log_info=said.append).params["w"][0] == 1
    assert said[0].startswith("checkpoint 2 is damaged (it has no manifest and cannot be read: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "1.sha256.json", "2.damaged"]


def test_a_damaged_step_whose_moving_was_interrupted_is_not_taken_for_a_whole_one(tmp_path, small, monkeypatch):
    saved(tmp_path, [small(1), small(2)])
    add_a_file(tmp_path / "2")  # Orbax reads it none the less
    (tmp_path / "2.damaged").mkdir()  # of an earlier time
    with monkeypatch.context() as patch:
        patch.setattr("rljax.train.checkpoint.os.rename", rename_and_stop)
        with pytest.raises(KeyboardInterrupt):
            restored(tmp_path, small(0))
    assert restored(tmp_path, small(0)).params["w"][0] == 1
    assert (tmp_path / "2.damaged.2" / "stray").is_file()
    assert restore_items(tmp_path, "params")[0] == 1


def rename_and_stop(*paths):
    os.replace(*paths)
    raise KeyboardInterrupt


def test_a_save_does_not_ask_jax_whether_the_job_is_to_end(tmp_path, small, monkeypatch):
    """JAX waits for the number after the last that it was given: steps of Orbax among them would hide it for good."""
    asked = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    saved(tmp_path, [small(5)])
    assert asked == []


def test_a_checkpoint_is_read_when_the_state_that_it_replaces_is_gone(tmp_path, small, monkeypatch):
    """Scripts keep names for the parameters that they began with."""
    saved(tmp_path, [small(1)])
    state = small(0).replace(opt_state=(jnp.ones(3),), frozen={"reference": jnp.ones(3)})
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore(state) is None
    assert not state.params["w"].is_deleted()  # a new run goes on with it
    checkpoints.save(1, state)
    gone = []
    restore = CheckpointManager.restore

    def watched(*args, **options):
        gone.extend(x.is_deleted() for x in (state.params["w"], *state.opt_state, state.frozen["reference"]))
        return restore(*args, **options)

    monkeypatch.setattr(CheckpointManager, "restore", watched)
    assert checkpoints.restore(state).frozen["reference"][0] == 1
    assert gone == [True, True, True]
    checkpoints.close()


def test_the_manifest_names_every_file_with_its_hash(tmp_path, small, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delattr(Path, "read_bytes")
        saved(tmp_path, [small(1)])
    manifest = json.loads((tmp_path / "1.sha256.json").read_text())
    assert manifest == files(tmp_path / "1")  # read whole here, and there piece by piece
    assert manifest


def test_what_goes_wrong_in_the_saving_thread_is_raised(tmp_path, small, monkeypatch):
    def full(self, step):
        raise OSError("disk full")

    monkeypatch.setattr(Checkpoints, "_write_manifest", full)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, small(1))
    with pytest.raises(OSError, match="disk full"):
        checkpoints.wait()
    checkpoints.close()


def test_a_step_saved_already_is_refused(tmp_path, small):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(5, small(5))
    with pytest.raises(Exception, match="5"):
        checkpoints.save(5, small(5))
    with pytest.raises(RuntimeError, match=r"step 4 was not saved; steps there: \[5\]"):
        checkpoints.save(4, small(4))
    checkpoints.close()


@pytest.mark.parametrize(
    ("params", "difference"),
    [
        ({"a": np.zeros((4, 3)), "layers": {1: np.zeros(3)}}, "params/a is (2, 3) there and (4, 3) here"),
        ({"layers": {1: np.zeros(3)}}, "params/a is (2, 3) there and absent here"),
        (
            {"a": np.zeros((2, 3)), "layers": {1: np.zeros(3), 2: np.zeros(3)}},
            "params/layers/2 is absent there and (3,)",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(params, difference, tmp_path):
    def state_of(params):
        return TrainState(1, jax.tree.map(jnp.asarray, params), {}, jax.random.key(0))

    with_checkpoints = Checkpoints(tmp_path / "checkpoints")
    with_checkpoints.save(1, state_of({"a": np.zeros((2, 3)), "layers": {1: np.zeros(3)}}))
    with pytest.raises(ValueError, match="holds a checkpoint of another model") as refused:
        with_checkpoints.restore(state_of(params))
    assert difference in str(refused.value)
    assert with_checkpoints.restore(state_of({"a": np.ones((2, 3)), "layers": {1: np.ones(3)}})) is not None
    with_checkpoints.close()
