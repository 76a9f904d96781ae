"""experiments/preflight.py: tables, formulas against the compiler's own report, and the programs of a run."""

import dataclasses
import importlib.util
import re
import shlex
import sys
from collections import Counter
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from experiments import grpo, preflight
from experiments.common import activations, command_line, costs, device_memory, lowering, micro_batches, models, plan
from experiments.common.chips import CHIPS, read_topology
from experiments.common.hlo import collectives
from experiments.common.model_shapes import SHAPES, find_shape
from experiments.common.sampling import training_sampling
from experiments.common.settings import Adapter, Batches, MeshShape, Sampling, Weights
from models import tiny
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.models.moe import MoEConfig, sharded_moe_mlp
from rljax.train.mesh import make_mesh
from test_grpo_experiment import RAW, ROWS, VERIFIERS, write_prompts, write_tokenizer

# Sizes of the stored tensors, from `metadata.total_size` of the files on the hub (2 bytes each; tied heads are not
# stored); Gemma 3: embedding and other parameters of Table 1 of its report (arXiv:2503.19786), in millions.
PUBLISHED = {
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "gemma-3-1b": (302 + 698) * 10**6,
    "gemma-3-4b": (675 + 3_209) * 10**6,
    "gemma-3-12b": (1_012 + 10_759) * 10**6,
    "gemma-3-27b": (1_416 + 25_600) * 10**6,
}
FEW = ("qwen2.5-0.5b", "qwen3-0.6b", "qwen3-30b-a3b", "llama-3.2-1b", "gemma-3-1b")  # the others take minutes
SMALL = preflight.Config(
    model="qwen2.5-0.5b",
    topology="v5e:2x4",
    max_prompt_tokens=16,
    batches=Batches(prompts=8, num_generations=2, micro_batches=1),
    sampling=Sampling(max_tokens=16),
    steps=2,
)


# ---------------------------------------------------------------------------------------------------------------- data


def test_every_shape_has_a_published_count():
    assert {path.name for path in SHAPES.iterdir()} == PUBLISHED.keys()


LARGE = [pytest.param(name, marks=pytest.mark.nightly) for name in PUBLISHED if name not in FEW]


@pytest.mark.parametrize("name", [*FEW, *LARGE])
def test_parameters_are_as_many_as_published(name):
    counted = costs.num_params(hf.read_config(find_shape(name)))
    rounded = 1e-3 if name.startswith("gemma") else 0
    assert counted == pytest.approx(PUBLISHED[name], rel=rounded, abs=0)


def test_a_token_of_a_mixture_uses_its_experts():
    """Qwen3-30B-A3B: 3.3 B activated parameters, as its model card says, the tables of embeddings included."""
    config = hf.read_config(find_shape("qwen3-30b-a3b"))
    tables = 2 * config.vocab_size * config.hidden_size
    assert (costs.token_weights(config) + tables) / 1e9 == pytest.approx(3.3, abs=0.06)


@pytest.mark.parametrize("name", ["v5e", "v5e:8", "v5e:8x8x8", "v7x:2x2x2", "h100:12", "h100:8x8", "v5e:0x8"])
def test_an_unknown_topology_lists_the_legal_ones(name):
    with pytest.raises(ValueError, match=r"legal: .*v5e:AxB.*h100:N"):
        read_topology(name)


def test_an_unknown_model_lists_the_legal_ones():
    with pytest.raises(ValueError, match=r"legal: .*qwen2\.5-7b.*qwen3-30b-a3b"):
        find_shape("qwen9-1b")


@pytest.mark.parametrize(
    ("topology", "places", "gigabytes"),
    [
        ("v5e:8x8", [(0, i) for i in range(8)], 50),  # no ring: each link in one direction at a time
        ("v5e:16x16", [(0, i) for i in range(16)], 100),
        ("v5e:8x8", [(i, j) for i in range(8) for j in range(8)], 100),  # links of two dimensions
        ("v5e:8x8", [(0, 0), (0, 4)], 12.5),  # four groups share the links between them
        ("v5p:8x8x8", [(0, 0, i) for i in range(8)], 200),
        ("v5p:2x2x4", [(0, 0, i) for i in range(4)], 100),  # no cube of 4 x 4 x 4: nothing closes to a ring
        ("v5e:8x16", [(0, i) for i in range(16)], 100),  # of two dimensions each by itself
        ("h100:16", [(i,) for i in range(8)], 450),
        ("h100:16", [(0,), (8,)], 50),
        ("h100:16", [(i,) for i in range(16)], 400),  # eight ports of a node
        ("v6e:8x8", [(0, 0)], float("inf")),  # one chip sends nothing
    ],
)
def test_bandwidth_of_a_group(topology, places, gigabytes):
    assert read_topology(topology).bandwidth(places) == gigabytes * 1e9


@pytest.mark.parametrize(
    ("chip", "passes"), [("v5e", 6), ("v5p", 6), ("h100", 989 / 67), ("h200", 989 / 67), ("b200", 2250 / 75)]
)
def test_float32_is_computed_without_the_fast_units(chip, passes):
    """Six products in bfloat16 on a TPU; on a GPU no tensor cores."""
    chip = CHIPS[chip]
    assert chip.peak_flops("bfloat16") / chip.peak_flops("float32") == pytest.approx(passes)
    name = f"{chip.name}:{'x'.join('2' * chip.torus) or 2}"
    cfg = preflight.Config("qwen3-0.6b", name, mesh=MeshShape(), batches=Batches(micro_batches=1))
    single = dataclasses.replace(cfg, weights=dataclasses.replace(cfg.weights, dtype="float32"))
    seconds = [planned(of).phases[0].seconds["compute"] for of in (cfg, single)]
    assert seconds[1] / seconds[0] == pytest.approx(passes)


# ------------------------------------------------------------------------------------------------------------ formulas


def planned(cfg: preflight.Config) -> plan.Plan:
    """By formulas."""
    config = hf.read_config(find_shape(cfg.model), cfg.max_prompt_tokens + cfg.sampling.max_tokens)
    return preflight.formulas(cfg, config, read_topology(cfg.topology), cfg.mesh.sizes)


def test_the_same_pieces_in_more_updates_move_the_same():
    """4 minibatches of 8 micro-batches and one of 32 gather, reduce and read weights equally often."""
    cfg = preflight.Config("qwen2.5-7b", "v5e:8x8", mesh=MeshShape(data=4, fsdp=4, tensor=4))
    few = planned(dataclasses.replace(cfg, batches=Batches(64, 8, minibatches=4, micro_batches=8))).phases
    one = planned(dataclasses.replace(cfg, batches=Batches(64, 8, minibatches=1, micro_batches=32))).phases
    for mine, other in zip(few, one, strict=True):
        assert mine.sent == other.sent
    by_name = {phase.name: phase for phase in few}
    sent = {(name, one.what, one.kind): one.bytes for name, phase in by_name.items() for one in phase.sent}
    assert sent["update", "weights", "all-gather"] / 1e9 == pytest.approx(182.8, abs=0.1)  # 2 x 32 x 3/4 of 2 N/4 bytes
    assert few[2].hbm_bytes == one[2].hbm_bytes
    three_optimizer_steps = 3 * 7 * costs.SINGLE * PUBLISHED["qwen2.5-7b"] / 16
    assert few[3].hbm_bytes - one[3].hbm_bytes == pytest.approx(three_optimizer_steps)


def pieces_of(model, topology, lengths, dtype="bfloat16", remat="full", batches=None, **sizes):
    topology = read_topology(topology)
    mesh = plan.abstract_mesh(topology, MeshShape(**sizes).sizes)
    config = dataclasses.replace(hf.read_config(find_shape(model), sum(lengths)), dtype=dtype, remat=remat)
    return micro_batches.cut(config, batches or Batches(64, 8), *lengths, mesh, topology.chip)


@pytest.mark.parametrize(
    ("topology", "remat", "sizes", "pieces"),
    [
        ("h100:8", "none", {}, (64, 1)),
        ("h100:8", "dots", {"fsdp": 2, "tensor": 4}, (64, 4)),
        ("h100:8", "full", {}, (8, 8)),  # an eighth of the weights' gathers, and each prompt computed once
        ("h100:8", "none", {"fsdp": 2, "tensor": 4}, (128, 2)),
        ("v5e:8x8", "full", {}, (4, 2)),
    ],
)
def test_the_cut_of_an_update_counts_what_remat_and_tensor_leave(topology, remat, sizes, pieces):
    """Qwen2.5-7B, 64 prompts x 8 completions of 1,024 + 3,072 tokens."""
    assert pieces_of("qwen2.5-7b", topology, (1024, 3072), remat=remat, **sizes) == pieces


@pytest.mark.parametrize(("model", "dtype"), [("qwen2.5-0.5b", "float32"), ("gemma-3-1b", "bfloat16")])
def test_the_cut_of_an_update_counts_scores_where_no_kernel_computes_them_again(model, dtype):
    """cuDNN's takes half precision, and heads of up to 128: Gemma 3 has 256."""
    config = hf.read_config(find_shape(model), 2048)
    layer, scores = config.num_layers, 8 * config.num_heads * 2048
    pieces = pieces_of(model, "h100:8", (256, 1792), dtype, remat="none")
    rows = 512 // (8 * pieces.micro_batches)
    assert layer * scores * rows * 1792 <= 80e9 / 4 < layer * scores * 4 * rows * 1792
    assert pieces_of("qwen2.5-0.5b", "h100:8", (256, 1792), remat="none").micro_batches < pieces.micro_batches


@pytest.mark.parametrize(("remat", "least"), [("none", 20e9 / 4), ("dots", 20e9 / 8), ("full", 0)])
def test_the_cut_and_the_plan_of_memory_hold_one_formula(remat, least):
    """What a micro-batch holds in the plan is within the part of memory that the cut allows."""
    mesh = plan.abstract_mesh(read_topology("h100:8"), MeshShape().sizes)
    config = hf.read_config(find_shape("qwen2.5-0.5b"), 4096)
    config = dataclasses.replace(config, dtype="float32", remat=remat, scan_layers=True)
    pieces = micro_batches.cut(config, Batches(64, 8), 1024, 1024, mesh, CHIPS["h100"])
    sizes = costs.Sizes(64, 8, 1024, 1024, pieces, scored=1, updates=1, epochs=1)
    update = device_memory.activation_terms(config, mesh, sizes, trained=1.0, backend="gpu")
    held = sum(update.get(name, 0) for name in ("one layer", "kept activations", "attention scores"))
    assert least < held <= 1.001 * 20e9


def test_a_cache_is_read_whole_where_its_heads_do_not_divide():
    """Qwen2.5-7B has four heads of keys and values: eight devices of `tensor` have a copy each."""

    def cache_reads(tensor, kv_heads):
        config = dataclasses.replace(hf.read_config(find_shape("qwen2.5-7b"), 4096), dtype="bfloat16", remat="full")
        cfg = preflight.Config("qwen2.5-7b", "v5e:8x8", batches=Batches(64, 8, micro_batches=1))
        topology, mesh = (
            read_topology(cfg.topology),
            plan.abstract_mesh(read_topology(cfg.topology), MeshShape(tensor=tensor).sizes),
        )
        sizes = lowering.sizes_of(cfg, config, mesh, topology.chip)
        longer = sizes._replace(prompt_tokens=sizes.prompt_tokens + 1)
        read = [costs.phases(config, topology, mesh, of)[1].hbm_bytes for of in (sizes, longer)]
        return read[1] - read[0]  # another key and value, for every token that is decoded

    of_token = 2 * 4 * 128 * 2 * 28
    assert cache_reads(4, 4) == pytest.approx(512 * 3072 * of_token / 64)
    assert cache_reads(8, 4) == pytest.approx(512 * 3072 * of_token / 8)


@pytest.mark.parametrize(
    ("model", "adapter", "sizes"),
    [("qwen2.5-7b", Adapter(rank=16), {}), ("qwen3-30b-a3b", Adapter(), {"fsdp": 8, "expert": 8})],
)
def test_gradients_lie_as_what_is_trained_does(model, adapter, sizes):
    """An adapter's are as small as it is, and what is no expert is not split over `expert`."""
    cfg = preflight.Config(model, "v6e:8x8", mesh=MeshShape(**sizes), batches=Batches(64, 8, micro_batches=2))
    cfg = dataclasses.replace(cfg, weights=dataclasses.replace(cfg.weights, adapter=adapter))
    update = planned(cfg).memory[-1].arrays
    assert update["gradients"] == 2 * update["parameters"]


# ----------------------------------------------------------------------------------------------------------------- HLO


def test_collectives_in_a_loop_count_each_time():
    """Five times an all-gather of [64 32] floats over the four devices of fsdp, which the compiler reports as one."""
    mesh = make_mesh(fsdp=4, tensor=2)
    weights = jax.ShapeDtypeStruct((5, 64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    @jax.jit
    def loop(weights, rows):
        def step(x, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(x @ whole @ whole.T), None

        return jax.lax.scan(step, rows, weights)[0]

    (found,) = collectives(loop.lower(weights, rows).compile().as_text())
    assert (found.kind, found.bytes, found.group, found.times) == ("all-gather", 64 * 32 * 4, (0, 2, 4, 6), 5)
    assert found.sent == 5 * 64 * 32 * 4 * 3 / 4


def test_collectives_of_a_shard_map_are_all_counted():
    """JAX gives them the same channel: here a gather and two sums."""
    mesh = make_mesh(fsdp=4, tensor=2)

    def of_device(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum(jnp.tanh(jax.lax.psum(gathered, "tensor")), "fsdp")

    mapped = jax.shard_map(of_device, mesh=mesh, in_specs=jax.P(("fsdp", "tensor")), out_specs=jax.P())
    found = collectives(jax.jit(mapped).lower(jax.ShapeDtypeStruct((64, 32), jnp.float32)).compile().as_text())
    assert sorted(one.kind for one in found) == ["all-gather", "all-reduce", "all-reduce"]


MODULE = """\
%counted (p: (s32[])) -> pred[] {
  %c = s32[] constant(28)
  %p = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body (p: (s32[])) -> (s32[]) {
  %g = bf16[8,16]{1,0:T(8,128)} all-gather(%x), channel_id=7, GROUPS, dimensions={0}
  %r = (f32[4]{0}, f32[2]{0}) all-reduce(%a, %b), channel_id=8, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %t = (s32[]) tuple(%i)
}

%step (p: (s32[])) -> bf16[8,16] {
  ROOT %g = bf16[8,16]{1,0:T(8,128)} all-gather(%x), channel_id=7, GROUPS, dimensions={0}
}

%open (p: (s32[])) -> pred[] {
  %c = s32[] constant(3)
  ROOT %both = pred[] and(%lt, %more)
}

%outer (p: (s32[])) -> (s32[]) {
  ROOT %w = (s32[]) while(%t), condition=%counted, body=%body
}

ENTRY %main (p: s32[]) -> (s32[]) {
  %f = bf16[8,16] fusion(%p), kind=kCustom, calls=%step
  ROOT %w = (s32[]) while(%t), condition=%open, body=%outer
}
"""


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", (0, 2)),
        ("replica_groups=[2,2]<=[4]", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", (0, 2)),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", (0, 1)),
        ("replica_groups=mesh['a'=4] {'a':(2)2}", (0, 1)),
    ],
)
def test_groups_and_loops_as_the_tpu_compiler_writes_them(groups, first):
    gather, reduce = collectives(MODULE.replace("GROUPS", groups), open_loop_trips=10)
    assert (gather.group, gather.times, gather.bytes) == (first, 280, 8 * 16 * 2)  # once a channel, 28 times in 10
    assert (reduce.bytes, reduce.times, reduce.sent) == (24, 280, 280 * 24)


# ------------------------------------------------------------------------------------------------- the compiler's word


@pytest.fixture(scope="module")
def on_eight() -> lowering.StepShapes:
    """The step of SMALL on the eight devices, with two layers."""
    mesh = make_mesh(fsdp=4, tensor=2)
    return lowering.shapes_of_step(SMALL, small_config(mesh), mesh)


def small_config(mesh):
    config = hf.read_config(find_shape(SMALL.model), 32)
    config = dataclasses.replace(config, num_layers=2, ropes=config.ropes[:2], windows=config.windows[:2])
    return models.trained_config(config, SMALL.weights, mesh)


@pytest.mark.parametrize("name", ["prefill", "scoring", "update"])
def test_bytes_of_arguments_and_results_are_the_compilers(on_eight, name):
    """To the byte, but for what the programs have of rows: some kilobytes."""
    program = next(one for one in on_eight.programs if one.name == name)
    stats = program.lower().compile().memory_analysis()
    assert 0 <= stats.argument_size_in_bytes - program.state_bytes < 8192
    if name == "update":
        state = on_eight.state
        kept = device_memory.device_bytes((state.params, state.opt_state, state.key))
        assert 0 <= stats.output_size_in_bytes - kept < 4096
        assert stats.alias_size_in_bytes == pytest.approx(kept, abs=64)


DENSE = decoder.DecoderConfig(512, 256, 2, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=512)
MIXTURE = dataclasses.replace(DENSE, moe=MoEConfig(8, 2, 128, layers=(0, 1), norm_topk_prob=True))


def sent_by_formulas_and_compiled(config, program, **sizes):
    """Bytes that a device sends in a step, {(kind, group of devices): bytes}: of a program with four micro-batches."""
    batches = Batches(8, 4, micro_batches=4)
    weights = Weights(dtype="float32", remat="full", scan_layers=True)
    cfg = dataclasses.replace(SMALL, batches=batches, weights=weights, mesh=MeshShape(**sizes))
    mesh = make_mesh(**cfg.mesh.sizes)
    config = models.trained_config(config, weights, mesh)
    step = lowering.shapes_of_step(cfg, config, mesh)
    phase = next(x for x in costs.phases(config, read_topology("v5e:2x4"), mesh, step.sizes) if x.name == program)
    lowered = next(x for x in step.programs if x.name == program)
    compiled: Counter = Counter()
    for one in collectives(lowered.lower().compile().as_text()):
        compiled[one.kind, one.group] += one.sent * lowered.calls
    formulas = {(one.what, one.kind, costs.group_along(mesh, one.axes)): one.bytes for one in phase.sent}
    return formulas, compiled


def test_each_micro_batch_sums_its_gradients_over_data():
    formulas, compiled = sent_by_formulas_and_compiled(DENSE, "update", data=2, fsdp=4)
    assert formulas["gradients", "all-reduce", (0, 4)] == pytest.approx(compiled["all-reduce", (0, 4)], rel=0.1)


@pytest.mark.parametrize("program", ["scoring", "update"])
def test_tokens_of_experts_are_collected_and_their_sums_scattered(program):
    formulas, compiled = sent_by_formulas_and_compiled(MIXTURE, program, fsdp=1, expert=8)
    for kind in ("all-gather", "reduce-scatter"):
        everyone = tuple(range(8))
        assert formulas["tokens of experts", kind, everyone] == pytest.approx(compiled[kind, everyone], rel=0.05)
    if program == "update":  # gradients of what each of them has whole; those of the one table are summed one by one
        sums = compiled["all-reduce", everyone]
        assert formulas["gradients", "all-reduce", everyone] == pytest.approx(sums, rel=0.2)


def test_sums_over_tensor_are_of_all_tokens_that_a_device_of_experts_collects():
    formulas, compiled = sent_by_formulas_and_compiled(MIXTURE, "scoring", fsdp=1, expert=4, tensor=2)
    assert formulas["hidden states", "all-reduce", (0, 1)] == pytest.approx(compiled["all-reduce", (0, 1)], rel=0.1)


def test_on_gpus_a_mixture_is_planned_as_the_dense_product_that_xla_makes_of_it():
    """[262144, 64 x 2560] for a product of [262144, 2560] and [64, 2560, 1280]: marin-community/marin, issue 7012."""
    moe = MoEConfig(64, 4, 1280, layers=(0, 1), norm_topk_prob=True)
    config, mesh = dataclasses.replace(MIXTURE, hidden_size=2560, moe=moe), make_mesh(fsdp=8)
    held = activations.expert_numbers(config, mesh, grouped=False, has_gradient=False)
    assert 262144 // 4 * held == 262144 * (1 + 64) * 2560
    of_experts = 2 * 4 * 3 * 2560 * 1280
    assert costs.token_weights(config, grouped=False) - costs.token_weights(config) == 63 * of_experts
    assert planned(preflight.Config("qwen3-30b-a3b", "h100:64", batches=Batches(64, 8))).over > 0


@pytest.mark.parametrize("has_gradient", [False, True])
@pytest.mark.parametrize("grouped", [True, False])
def test_bytes_of_a_layer_of_experts_are_the_compilers(grouped, has_gradient, monkeypatch):
    """Grouped: with a plain product of the same sizes in the place of a CPU's, which is dense."""
    if grouped:
        monkeypatch.setattr(jax.lax, "ragged_dot", lambda x, weights, group_sizes, precision: x @ weights[0])
    mesh = make_mesh(fsdp=1, expert=8)
    rows, tokens, D, F, E, k = 16, 256, 256, 96, 32, 8
    config = dataclasses.replace(MIXTURE, hidden_size=D, moe=MoEConfig(E, k, F, layers=(0, 1), norm_topk_prob=True))

    def shape(spec, *sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    of_rows, of_expert = partial(shape, ("expert",), rows, tokens), partial(shape, ("expert",), E)
    sharding = NamedSharding(mesh, PartitionSpec("expert", None, None))
    arguments = of_rows(D), of_rows(k, dtype=jnp.int32), of_rows(k), of_expert(D, F), of_expert(D, F), of_expert(F, D)

    def layer(*arguments):
        return sharded_moe_mlp(*arguments, jax.nn.silu, sharding)

    def backward(x, chosen, *others):
        of_layer = jax.checkpoint(lambda x, *others: layer(x, chosen, *others))
        return jax.vjp(of_layer, x, *others)[1](x)

    lowered = jax.jit(backward if has_gradient else layer).lower(*arguments)
    predicted = 4 * rows / 8 * tokens * activations.expert_numbers(config, mesh, grouped, has_gradient)
    assert predicted == pytest.approx(lowered.compile().memory_analysis().temp_size_in_bytes, rel=0.15)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("model", "sizes", "lengths", "micro_batches"),
    [
        ("qwen2.5-0.5b", {"fsdp": 8}, (256, 256), 16),
        ("qwen2.5-0.5b", {"fsdp": 8}, (256, 256), 2),
        ("qwen3-0.6b", {"data": 2, "fsdp": 4}, (128, 384), 16),
        ("qwen2.5-0.5b", {"fsdp": 4, "tensor": 2}, (256, 256), 16),
        ("llama-3.2-1b", {"fsdp": 8}, (128, 256), 4),
    ],
)
def test_predicted_bytes_are_within_5_percent_of_the_compilers(model, sizes, lengths, micro_batches):
    """In float32: for bfloat16 XLA makes copies on a CPU that no accelerator needs."""
    batches = Batches(prompts=16, num_generations=8, micro_batches=micro_batches)
    weights = Weights(dtype="float32", remat="full", scan_layers=True)
    cfg = dataclasses.replace(SMALL, model=model, mesh=MeshShape(**sizes), batches=batches, weights=weights)
    cfg = dataclasses.replace(cfg, max_prompt_tokens=lengths[0], sampling=Sampling(max_tokens=lengths[1]))
    mesh = make_mesh(**cfg.mesh.sizes)
    config = models.trained_config(hf.read_config(find_shape(model), sum(lengths)), weights, mesh)
    step = lowering.shapes_of_step(cfg, config, mesh)
    predicted = plan.by_formulas(config, read_topology("h100:8"), mesh, step.sizes, step.state, "cpu")
    resident = sum(plan.resident(step.state).values())
    by_name = {one.name: one for one in step.programs}
    for one in predicted.memory:
        stats = by_name[one.program].lower().compile().memory_analysis()
        beside = resident - by_name[one.program].state_bytes
        changed = stats.output_size_in_bytes - stats.alias_size_in_bytes
        compiled = stats.argument_size_in_bytes + stats.temp_size_in_bytes + changed + beside
        print(f"{model}, {sizes}, {one.program}: {one.total / compiled:.3f}")
        assert one.total == pytest.approx(compiled, rel=0.05), one.program


def test_bytes_of_a_cache_are_those_of_its_arrays():
    mesh = make_mesh(fsdp=2, tensor=2, data=2)
    config = small_config(mesh)
    sizes = lowering.sizes_of(SMALL, config, mesh)
    heads = config.num_kv_heads // 2
    of_token = 2 * config.num_layers * heads * config.head_dim * 2
    assert device_memory.cache_bytes(config, mesh, sizes) == (8 // 4 * 16 + 16 // 4 * 16) * of_token


def test_pairs_of_a_window():
    config = hf.read_config(find_shape("gemma-3-1b"))
    window = config.window(0)
    every = sum(min(i + 1, window) for i in range(700)), sum(i + 1 for i in range(700))
    layers = [config.window(i) is None for i in range(config.num_layers)]
    assert costs.seen_pairs(config, 0, 700) == pytest.approx(sum(every[full] for full in layers) / len(layers))


def test_flops_of_a_forward_pass_are_the_compilers():
    """Unrolled layers without remat; the compiler counts norms and softmax too."""
    config = dataclasses.replace(small_config(make_mesh(fsdp=4, tensor=2)), hidden_sharding=None, scan_layers=False)
    config = dataclasses.replace(config, dtype="float32")
    rows = jax.ShapeDtypeStruct((4, 128), jnp.int32)

    def run(params, rows):
        hidden, _ = decoder.forward(config, params, rows, rows, rows)
        return decoder.logits(config, params, hidden)

    counted = jax.jit(run).lower(decoder.abstract(config), rows).cost_analysis()["flops"]
    every_pair = 4 * 128 * 128  # XLA's attention computes what the mask hides
    assert costs.forward_flops(config, 4 * 128, every_pair, 4 * 128) == pytest.approx(counted, rel=0.03)


# ------------------------------------------------------------------------------------------------ the programs of a run


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=7),
        pytest.param(Sampling(max_tokens=7, top_p=0.9, support=8, min_tokens=2), marks=pytest.mark.nightly),
    ],
)
def test_the_programs_are_those_that_a_run_lowers(sampling, tmp_path, monkeypatch):
    """The StableHLO of a run of grpo.py on eight devices, as JAX writes it, against that from shapes."""
    write_tokenizer(tiny.write(tmp_path / "model", RAW, tiny.tensors_of(RAW)))
    settings = {
        "model": str(tmp_path / "model"),
        "batches": Batches(prompts=8, num_generations=3, micro_batches=1),
        "sampling": sampling,
        "mesh": MeshShape(fsdp=4, tensor=2),
        "steps": 1,
    }
    prompts = write_prompts(tmp_path / "prompts.jsonl", ROWS * 3)
    cfg = grpo.Config(**settings, prompts=prompts, rewards=("share",), eval_prompts=2, directory=str(tmp_path / "run"))
    dumped = tmp_path / "dumped"
    jax.config.update("jax_dump_ir_to", str(dumped))
    try:
        grpo.main(cfg, verifiers=VERIFIERS)
    finally:
        jax.config.update("jax_dump_ir_to", None)

    prompt_tokens = 1 + max(len(row["prompt"]) for row in ROWS)  # <s> and a token a character
    asked = preflight.Config(**settings, topology="v5e:2x4", max_prompt_tokens=prompt_tokens, weights=Weights())
    asked = dataclasses.replace(asked, optimizer=cfg.optimizer)
    mesh = make_mesh(fsdp=4, tensor=2)
    context = prompt_tokens + asked.sampling.max_tokens
    config = models.trained_config(hf.read_config(cfg.model, context), asked.weights, mesh)
    stop = load_tokenizer(cfg.model).stop
    planned = {one.name: one for one in lowering.shapes_of_step(asked, config, mesh, stop).programs}
    of_run = {without_names(path.read_text()) for path in dumped.glob("*.mlir")}
    for name in ("rollout", "scoring", "update"):
        assert without_names(planned[name].lower().as_text()) in of_run, name


def without_names(module: str) -> str:
    """The text of a module without locations, in which JAX tells people where an operation comes from."""
    module = re.sub(r"^#loc.*$", "", module, flags=re.M)
    kept = []
    end = 0
    for start in re.finditer(r" ?\bloc\(", module):
        if start.start() < end:
            continue
        kept.append(module[end : start.start()])
        depth, end = 1, start.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(module[end], 0)
            end += 1
    return re.sub(r"\s+", " ", "".join([*kept, module[end:]])).strip()


# --------------------------------------------------------------------------------------------------------- the command


def test_gpus_are_planned_by_formulas(capsys, tmp_path):
    page = tmp_path / "plan.html"
    cfg = preflight.Config(
        "qwen3-8b", "h100:16", mesh=MeshShape(fsdp=-1, tensor=8), price=2.0, html=str(page), batches=Batches(prompts=16)
    )
    found = preflight.main(cfg)
    out = capsys.readouterr().out
    assert found.over < 0
    assert "fits" in out
    assert "at 2 a device-hour" in out
    assert "<html" in page.read_text()
    assert "KV cache" in page.read_text()


def test_what_does_not_fit_says_by_how_much_and_what_to_try(capsys):
    found = preflight.main(preflight.Config("llama-3-70b", "v5e:4x4", programs="none"))
    assert found.over > 0
    out = capsys.readouterr().out
    assert re.search(r"does not fit, by [\d.,]+ GiB a device .*largest: .*Try ", out)


def test_a_sweep_ranks_meshes_and_says_why(capsys):
    cfg = preflight.Config("qwen2.5-7b", "v5e:8x8", programs="none", sweep=True)
    found = preflight.main(cfg)
    out = capsys.readouterr().out
    config = hf.read_config(find_shape(cfg.model))
    plans = preflight.sweep(cfg, config, read_topology(cfg.topology))
    assert len(plans) >= 6
    assert dict(found.mesh.shape) == dict(plans[0].mesh.shape)
    fitting = [one for one in plans if one.over <= 0]
    assert all(plans[0].seconds <= one.seconds for one in fitting)
    assert found.gathers  # the best one gathers the weights once a rollout
    assert {one.gathers for one in plans} == {False, True}
    reasons = [plan.why_not(one, plans[0]) for one in plans[1:]]
    assert all(reasons)
    assert any("all-gather of weights over fsdp" in reason for reason in reasons)
    assert "why not first" in out


def test_a_sweep_passes_over_batches_that_do_not_divide_and_nothing_else(capsys):
    cfg = preflight.Config("qwen2.5-0.5b", "h100:2", sweep=True, batches=Batches(prompts=3, num_generations=2))
    preflight.main(cfg)
    with pytest.raises(ValueError, match="the batch divides over no mesh of 2 devices"):
        preflight.main(dataclasses.replace(cfg, batches=Batches(prompts=3, num_generations=2, micro_batches=4)))
    with pytest.raises(ValueError, match="kl_in_reward changes the rewards, and this method reads each score"):
        preflight.main(dataclasses.replace(cfg, algorithm="gdpo", kl_in_reward=True))


OFFLOADED = Weights(dtype="bfloat16", remat="full", scan_layers=True, offload=("opt_state", "frozen"))


@pytest.mark.parametrize("sweep", [False, True])
def test_what_waits_on_the_host_is_on_the_device_where_it_is_used(sweep, capsys):
    here = preflight.Config("qwen2.5-7b", "h100:8", batches=Batches(16, 8, micro_batches=4), sweep=sweep)
    here = dataclasses.replace(here, weights=dataclasses.replace(OFFLOADED, offload=()))
    kept = {one.program: one.arrays for one in preflight.main(here).memory}
    found = preflight.main(dataclasses.replace(here, weights=OFFLOADED))
    offloaded = {one.program: one.arrays for one in found.memory}
    assert offloaded["rollout"]["optimizer"] < 100  # its counters
    assert "reference" not in offloaded["rollout"]
    assert offloaded["scoring"]["reference"] == kept["scoring"]["reference"] > 0
    applying = {"parameters", "gradients", "optimizer"}
    least = sum(kept["update"][name] for name in applying) * (1 - 1e-6)  # scalars stay on the device
    assert least <= sum(offloaded["update"].values()) < sum(kept["update"].values())


@pytest.mark.parametrize(
    "refused",
    [
        {"batches": Batches(64, 8, carry_over=8)},
        {"batches": Batches(64, 8, oversample=2)},
        {"batches": Batches(64, 8, max_tokens_per_device=8192)},
        {"sampling": Sampling(max_concurrent=32)},
        {"sampling": Sampling(stop_strings=("\\n",))},
        {"sampling": Sampling(temperature=0.0)},
        {"sampling": Sampling(repetition_penalty=1.1)},
    ],
)
def test_a_setting_that_is_not_planned_is_refused(refused):
    (block,) = refused.values()
    changed = {name for name in block.__dict__ if getattr(block, name) != getattr(type(block)(), name)}
    with pytest.raises(ValueError, match=f"({'|'.join(changed)}).*legal") as error:
        preflight.main(dataclasses.replace(SMALL, topology="h100:8", **refused))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9, "min_p": 0.01, "support": 32, "min_tokens": 3}])
def test_the_planned_sampling_is_that_of_a_run(options):
    cfg = dataclasses.replace(SMALL, sampling=Sampling(max_tokens=16, temperature=0.7, **options))
    config = hf.read_config(find_shape(SMALL.model), 32)
    of_run = training_sampling(cfg.sampling, 2, SimpleNamespace(stop=(0,)), config.vocab_size)
    assert lowering.planned_sampling(cfg, config, stop=(0,)) == of_run
    assert of_run.support in (5, 32)


def test_nothing_that_is_refused_is_recommended():
    assert not [name for name in lowering.PLANNED for advice in plan.TRY.values() if name in advice]


def test_the_last_line_is_the_run_that_was_planned(capsys, monkeypatch):
    cfg = preflight.Config("qwen2.5-7b", "h100:16", mesh=MeshShape(fsdp=-1, tensor=4), kl_coef=0.0, algorithm="dapo")
    weights = dataclasses.replace(cfg.weights, gather_for_generation=True, offload=("opt_state",))
    sampling = Sampling(max_tokens=1024, top_p=0.9, support=32)
    cfg = dataclasses.replace(cfg, sweep=True, weights=weights, sampling=sampling, batches=Batches(32, 16))
    found = preflight.main(cfg)
    line = capsys.readouterr().out.strip().splitlines()[-1]
    start, command = line.split(": ", 1)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    run = command_line.parse(grpo.Config).config
    assert start == "this program"
    for name in ("model", "max_prompt_tokens", "algorithm", "kl_coef", "steps", "sampling", "optimizer"):
        assert getattr(run, name) == getattr(cfg, name), name
    assert run.mesh.sizes == dict(found.mesh.shape)
    assert run.weights == dataclasses.replace(weights, gather_for_generation=found.gathers)
    assert run.batches == dataclasses.replace(cfg.batches, micro_batches=found.sizes.pieces.micro_batches)
    asked = dataclasses.replace(cfg, mesh=run.mesh, weights=run.weights, batches=run.batches)
    assert planned(asked).sizes == found.sizes


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is here")
def test_without_libtpu_one_line_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install \"rljax\[preflight\]\""):
        preflight.main(preflight.Config("qwen3-0.6b", "v5e:2x2"))


class Refused:
    """A lowered program that the compiler refuses."""

    def __init__(self, message):
        self.message = message

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_program_that_does_not_fit_is_as_large_as_the_compiler_says():
    """Its words for the update of Llama-3-70B on v5e:4x4."""
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (99.82G) exceeds "
        "available HBM (15.75G)."
    )
    program = lowering.Program("update", lambda: Refused(message), state_bytes=2**30, calls=1)
    assert preflight.compile_program(program, 1) == ({"temporaries": pytest.approx(98.82 * 2**30)}, [])


def test_what_the_compiler_refuses_is_one_error():
    program = lowering.Program("update", lambda: Refused("INTERNAL: Mosaic failed\nat line 3"), 0, 1)
    with pytest.raises(ValueError, match=r"program of update: INTERNAL: Mosaic failed; legal: another --mesh.*none"):
        preflight.compile_program(program, 1)


@pytest.mark.nightly
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is absent (the preflight extra)")
def test_a_topology_is_compiled_for(capsys):
    cfg = dataclasses.replace(
        SMALL, topology="v5e:2x2", mesh=MeshShape(fsdp=4), batches=Batches(prompts=4, num_generations=2)
    )
    found = preflight.main(cfg)
    assert {one.program for one in found.memory} == {"prefill", "rollout", "scoring", "update"}
    assert all(one.total > 0 for one in found.memory)
    assert any(one.kind == "all-gather" for one in found.collectives["rollout"])
    assert "fits" in capsys.readouterr().out
