"""Adapter directories in PEFT's format: round trips, every refusal; and, where peft is installed, peft itself."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rljax.models import decoder, hf, layout, lora, peft
from rljax.models.lora import LoraConfig
from rljax.models.moe import MoEConfig

CONFIG = decoder.DecoderConfig(13, 12, 3, 2, 1, 8, 20)
MIXTURE = dataclasses.replace(CONFIG, moe=MoEConfig(4, 2, 9, (0, 2), True))
VARIANTS = {
    "lora": LoraConfig(4, 6.5),
    "rslora": LoraConfig(4, 8.0, use_rslora=True),
    "dora": LoraConfig(4, 8.0, use_dora=True),
}
SOME = ("layers/0/attention/(query|out)", "layers/2/mlp/down")


def stirred(tree, seed=0):
    """Random everywhere: no zeros, and no magnitude is the norm of W."""
    random = np.random.RandomState(seed)
    return jax.tree.map(lambda x: np.asarray(x) + np.float32(0.15 * random.standard_normal(x.shape)), tree)


def adapter_of(config, seed=0):
    shapes = jax.eval_shape(
        lambda: lora.init(config.adapter, decoder.init(config, jax.random.key(0)), jax.random.key(0))
    )
    return stirred(jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes), seed)


def base_of(directory, family="llama"):
    """All that is read of the base: is it Phi-3?"""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return directory


def saved(directory, made=VARIANTS["lora"], config=CONFIG, family="llama"):
    """(config with the adapter, adapter, its directory)"""
    config = dataclasses.replace(config, adapter=made)
    adapter = adapter_of(config)
    peft.save_adapter(directory / "adapter", config, adapter, base_of(directory / "base", family))
    return config, adapter, directory / "adapter"


def read_json(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def rewrite(directory, fields=None, tensors=None):
    if fields is not None:
        (directory / "adapter_config.json").write_text(json.dumps(read_json(directory) | fields))
    if tensors is not None:
        save_file(tensors, directory / "adapter_model.safetensors")


def same(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ---------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("config", "targets"),
    [(CONFIG, LoraConfig().targets), (CONFIG, SOME), (CONFIG, ("mlp/up",)), (MIXTURE, ("attention/",))],
)
def test_what_was_written_is_read(variant, config, targets, tmp_path):
    made = dataclasses.replace(VARIANTS[variant], targets=targets)
    config, adapter, directory = saved(tmp_path, made, config)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter", "base"]
    got, read = peft.load_adapter(directory, dataclasses.replace(config, adapter=None))
    same(read, adapter)
    assert {x.dtype for x in jax.tree.leaves(read)} == {jnp.dtype("float32")}
    assert dataclasses.replace(got, targets=targets) == made
    shapes = decoder.abstract(config)
    assert lora.targets(got, shapes) == lora.targets(made, shapes)


def test_files_are_as_peft_names_them(tmp_path):
    _, adapter, directory = saved(tmp_path, dataclasses.replace(VARIANTS["dora"], targets=SOME))
    attention, mlp = adapter["layers"][0]["attention"], adapter["layers"][2]["mlp"]["down"]
    before = "base_model.model.model.layers"
    want = {
        f"{before}.0.self_attn.q_proj.lora_A.weight": attention["query"]["down"].T,
        f"{before}.0.self_attn.q_proj.lora_B.weight": attention["query"]["up"].reshape(4, 16).T,
        f"{before}.0.self_attn.q_proj.lora_magnitude_vector": attention["query"]["magnitude"].reshape(16),
        f"{before}.0.self_attn.o_proj.lora_A.weight": attention["out"]["down"].reshape(16, 4).T,
        f"{before}.0.self_attn.o_proj.lora_B.weight": attention["out"]["up"].T,
        f"{before}.0.self_attn.o_proj.lora_magnitude_vector": attention["out"]["magnitude"],
        f"{before}.2.mlp.down_proj.lora_A.weight": mlp["down"].T,
        f"{before}.2.mlp.down_proj.lora_B.weight": mlp["up"].T,
        f"{before}.2.mlp.down_proj.lora_magnitude_vector": mlp["magnitude"],
    }
    stored = load_file(directory / "adapter_model.safetensors")
    assert stored.keys() == want.keys()
    same(stored, want)
    raw = read_json(directory)
    fields = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "base_model_name_or_path")
    assert [raw[name] for name in fields] == ["LORA", "CAUSAL_LM", 4, 8, False, True, "none", str(tmp_path / "base")]


@pytest.mark.parametrize(
    ("config", "targets", "want"),
    [
        (CONFIG, ("query", "mlp/up"), ["q_proj", "up_proj"]),
        (MIXTURE, ("attention/(key|out)",), ["k_proj", "o_proj"]),
        (CONFIG, ("layers/[01]/attention/query",), [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]),
    ],
)
def test_module_names_are_short_where_all_layers_are_alike(config, targets, want, tmp_path):
    *_, directory = saved(tmp_path, dataclasses.replace(VARIANTS["lora"], targets=targets), config)
    assert read_json(directory)["target_modules"] == want


def test_half_precision_is_read_exactly(tmp_path):
    config, adapter, _ = saved(tmp_path)
    half = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), adapter)
    peft.save_adapter(tmp_path / "half", config, half, tmp_path / "base")
    assert {x.dtype for x in load_file(tmp_path / "half" / "adapter_model.safetensors").values()} == {
        half["layers"][0]["mlp"]["up"]["up"].dtype
    }
    same(peft.load_adapter(tmp_path / "half", config)[1], jax.tree.map(np.float32, half))


# -------------------------------------------------------------------------------------------------------------- writing


def test_there_is_never_half_a_directory(tmp_path, monkeypatch):
    config, adapter, directory = saved(tmp_path)
    with pytest.raises(ValueError, match=r"adapter is not empty; name a directory that does not exist yet"):
        peft.save_adapter(directory, config, adapter, tmp_path / "base")

    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "second").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(peft, "save_file", fail)
        with pytest.raises(OSError, match="disk full"):
            peft.save_adapter(tmp_path / "second", config, adapter, tmp_path / "base")
    assert not list((tmp_path / "second").iterdir())
    peft.save_adapter(tmp_path / "second", config, adapter, tmp_path / "base")
    same(peft.load_adapter(tmp_path / "second", config)[1], adapter)


def test_an_adapter_that_the_config_does_not_describe_is_not_written(tmp_path):
    config, adapter, _ = saved(tmp_path)
    other = dataclasses.replace(config, adapter=LoraConfig(4, targets=("layers/[01]/", "layers/2/attention")))
    message = r"the adapter is not that of Lora\(rank=4.*: layers/2/mlp/down/down, .* and 2 more differ"
    with pytest.raises(ValueError, match=message):
        peft.save_adapter(tmp_path / "other", other, adapter, tmp_path / "base")


def test_a_base_without_a_config_is_an_error(tmp_path):
    config, adapter, _ = saved(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model in .*nowhere: config.json is missing"):
        peft.save_adapter(tmp_path / "other", config, adapter, tmp_path / "nowhere")


def test_fused_projections_are_merged_instead(tmp_path):
    """Phi-3's qkv_proj has one A where we have three."""
    _, adapter, directory = saved(tmp_path / "apart", LoraConfig(4, targets=("out", "mlp/down")), family="phi3")
    same(peft.load_adapter(directory, CONFIG)[1], adapter)
    message = r"mlp.gate_up_proj, .*self_attn.qkv_proj and 2 more: Phi-3 stores these .* merge the adapter .*lora.merge"
    with pytest.raises(ValueError, match=message):
        saved(tmp_path / "fused", family="phi3")
    assert not (tmp_path / "fused" / "adapter").exists()
    tensors = load_file(directory / "adapter_model.safetensors")
    rewrite(directory, None, {name.replace("o_proj", "qkv_proj"): tensor for name, tensor in tensors.items()})
    with pytest.raises(ValueError, match=r"self_attn.qkv_proj.*: Phi-3 stores these .* \(peft: merge_and_unload\)"):
        peft.load_adapter(directory, CONFIG)


def test_mlps_of_a_mixture_are_merged_instead(tmp_path):
    """peft 0.21 with transformers 5: "layers.1.mlp.down_proj" turns into the experts' parameters, of all layers."""
    message = r"model.layers.1.mlp.down_proj, .* peft takes any MLP of a mixture for its experts; merge the adapter"
    with pytest.raises(ValueError, match=message):
        saved(tmp_path, LoraConfig(4, targets=("layers/1/",)), MIXTURE)


# -------------------------------------------------------------------------------------------------------------- reading

OFF = r"legal: off \(null, false, empty\)"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3', legal: 'LORA'"),
        ({"peft_type": None}, "peft_type is None, legal: 'LORA'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS', legal: 'CAUSAL_LM' or None"),
        ({"bias": "all"}, "bias is 'all', legal: 'none'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', legal: True or False or 'gaussian'"),
        ({"r": None}, "r is None, legal: a positive number"),
        ({"lora_alpha": 0}, "lora_alpha is 0, legal: a positive number"),
        ({"rank_pattern": {"q_proj": 2}}, f"rank_pattern is {{'q_proj': 2}}, {OFF}"),
        ({"alpha_pattern": {"q_proj": 2}}, f"alpha_pattern is {{'q_proj': 2}}, {OFF}"),
        ({"modules_to_save": ["lm_head"]}, rf"modules_to_save is \['lm_head'\], {OFF}"),
        ({"fan_in_fan_out": True}, f"fan_in_fan_out is True, {OFF}"),
        ({"lora_bias": True}, f"lora_bias is True, {OFF}"),
        ({"layer_replication": [[0, 2], [1, 3]]}, rf"layer_replication is \[\[0, 2\], \[1, 3\]\], {OFF}"),
        ({"trainable_token_indices": [0]}, rf"trainable_token_indices is \[0\], {OFF}"),
        ({"alora_invocation_tokens": [5]}, rf"alora_invocation_tokens is \[5\], {OFF}"),
        ({"target_parameters": ["experts.down_proj"]}, f"target_parameters is .*, {OFF}"),
        ({"use_qalora": True}, f"use_qalora is True, {OFF}"),
        ({"of_tomorrow": 1}, f"of_tomorrow is 1, {OFF}"),
        ({"bias": "all", "use_qalora": True}, f"bias is 'all', legal: 'none'; use_qalora is True, {OFF}"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(fields, message, tmp_path):
    config, _, directory = saved(tmp_path)
    rewrite(directory, fields)
    with pytest.raises(ValueError, match=rf"adapter_config.json: {message}"):
        peft.load_adapter(directory, config)


def test_what_changes_nothing_is_not_refused(tmp_path):
    config, adapter, directory = saved(tmp_path)
    fields = {"lora_dropout": 0.1, "layers_to_transform": [0, 1, 2], "peft_version": "9", "init_lora_weights": "eva"}
    rewrite(directory, fields | {"lora_bias": False, "of_tomorrow": None})
    raw = read_json(directory)
    for name in ("use_rslora", "use_dora", "bias", "init_lora_weights", "task_type"):
        del raw[name]  # older files lack them
    (directory / "adapter_config.json").write_text(json.dumps(raw))
    same(peft.load_adapter(directory, config)[1], adapter)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


def swapped(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(gone):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without(f"{QUERY}.lora_B.weight"),
            f"tensors missing {QUERY}.lora_B.weight; not of this model's adapters none",
        ),
        (
            swapped("layers.1", "layers.3"),
            "missing none; not of .* base_model.model.model.layers.3.mlp.* and 10 more; legal",
        ),
        (
            swapped("q_proj", "c_attn"),
            "adapters .*c_attn.*legal: lora_A.weight.*of down_proj, gate_proj, k_proj, o_proj",
        ),
        (swapped(f"{QUERY}.lora_A.weight", "base_model.model.model.embed_tokens.lora_embedding_A"), "lora_embedding_A"),
        (
            swapped(f"{QUERY}.lora_A.weight", "base_model.model.lm_head.weight"),
            "adapters base_model.model.lm_head.weight",
        ),
        (lambda t: t | {f"{QUERY}.lora_B.bias": np.zeros(16)}, f"adapters {QUERY}.lora_B.bias"),
        (lambda t: t | {f"{QUERY}.lora_magnitude_vector": np.zeros(16)}, f"adapters {QUERY}.lora_magnitude_vector"),
        (
            lambda t: t | {f"{QUERY}.lora_A.weight": np.zeros((4, 13))},
            r"lora_A.weight has shape \(4, 13\); .* make it \(4, 12\)",
        ),
        (
            lambda t: {n: x[:3] if "lora_A" in n else x[:, :3].copy() for n, x in t.items()},
            r"has shape .*3.* make it .*4",
        ),
        (lambda t: {}, "tensors missing none; not of this model's adapters none; legal: lora_A.weight"),
    ],
)
def test_tensors_that_are_missing_unknown_or_misshapen(change, message, tmp_path):
    config, _, directory = saved(tmp_path)
    rewrite(directory, None, change(load_file(directory / "adapter_model.safetensors")))
    with pytest.raises(ValueError, match=message):
        peft.load_adapter(directory, config)


def test_directories_that_hold_no_adapter(tmp_path):
    config, _, directory = saved(tmp_path)
    (directory / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not JSON"):
        peft.load_adapter(directory, config)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (directory / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"no adapter in .*: {name} is missing"):
            peft.load_adapter(directory, config)


# --------------------------------------------------------------------------------------------------------- peft itself

IDS = np.random.RandomState(0).randint(0, 37, (2, 9))
EVERY = "^(?!layers/2/mlp/down)"  # but one: twenty modules and more take another way through peft


def parity(test):
    ignored = ("ignore::FutureWarning", "ignore:The following .*_pattern keys:RuntimeWarning")
    return pytest.mark.parity(pytest.mark.filterwarnings(*ignored)(test))


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("peft", reason="torch is absent: no peft")
    return pytest.importorskip("torch", reason="torch is absent")


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "qwen3_moe"])
def model(request, torch, tmp_path_factory):
    """The directory of a random model, our config of it, our parameters."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    fields = {
        "vocab_size": 37,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    if request.param == "qwen3_moe":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "mlp_only_layers": [1]}
    made, random = AutoModelForCausalLM.from_config(CONFIG_MAPPING[request.param](**fields)), torch.Generator()
    with torch.no_grad():
        for name, p in made.named_parameters():
            noise = torch.randn(p.shape, generator=random.manual_seed(p.numel()))
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + (not name.endswith("bias")))
    directory = tmp_path_factory.mktemp(request.param)
    made.save_pretrained(directory)
    config = hf.read_config(directory)
    return directory, config, hf.load(directory, config)


def fresh(directory):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()


def theirs(torch, peft_model):
    with torch.no_grad():
        return peft_model(torch.tensor(IDS)).logits.numpy()


@partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})
def ours(config, params, base):
    whole = decoder.full_params(config, params, {"base": {"decoder": base}})["decoder"]
    places = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)
    hidden, _ = decoder.forward(config, whole, jnp.asarray(IDS), places, jnp.ones_like(places))
    return decoder.logits(config, whole, hidden)


def agree(config, base, adapter, want):
    """Logits, of which the adapter is to be seen."""
    got = ours(config, {"lora": adapter}, base)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    assert np.abs(got - ours(config, {}, base)).max() > 0.1


@parity
@pytest.mark.parametrize(
    ("variant", "targets"),
    [("lora", None), ("rslora", None), ("dora", None), ("lora", (EVERY,)), ("dora", (*SOME[:1], "layers/1/mlp/down"))],
)
def test_what_we_write_peft_computes(torch, model, variant, targets, tmp_path):
    from peft import PeftModel

    directory, config, base = model
    if config.moe:  # no MLP
        targets = ("layers/[01]/attention/",) if targets else ("attention/",)
    made = dataclasses.replace(VARIANTS[variant], targets=targets or LoraConfig().targets)
    config = dataclasses.replace(config, adapter=made)
    adapter = stirred(lora.init(made, base, jax.random.key(0)))
    peft.save_adapter(tmp_path / "adapter", config, adapter, directory)
    read = PeftModel.from_pretrained(fresh(directory), tmp_path / "adapter")
    agree(config, base, adapter, theirs(torch, read))
    with_lora = {n.removeprefix("base_model.model.") for n, m in read.named_modules() if hasattr(m, "lora_A")}
    modules = [layout.tensor_slices(config)[path][0].name.removesuffix(".weight") for path in lora.targets(made, base)]
    assert with_lora == set(modules)

    want = {name: tensor.numpy() for name, tensor in read.merge_and_unload().state_dict().items()}
    for name, tensor in hf.named_tensors(config, lora.merge(made, base, adapter)):
        if ".experts." not in name:  # which transformers holds as one, and no adapter changes
            np.testing.assert_allclose(tensor, want[name], rtol=1e-5, atol=1e-6, err_msg=name)


@parity
@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
        {"target_modules": ["q_proj", "o_proj"], "use_rslora": True},
        {"target_modules": ["v_proj", "k_proj"], "use_dora": True, "lora_dropout": 0.1},
        {"target_modules": r".*layers\.[02]\..*(q|o)_proj"},
        {"target_modules": ["o_proj", "v_proj"], "layers_to_transform": [1, 2]},
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.1.self_attn.v_proj"]},
        {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
        {"target_modules": "all-linear"},
    ],
)
def test_what_peft_writes_we_compute(torch, model, fields, tmp_path):
    from peft import LoraConfig, get_peft_model

    directory, config, base = model
    made = get_peft_model(fresh(directory), LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **fields)).eval()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.add_(0.15 * torch.randn(p.shape, generator=random))
    made.save_pretrained(tmp_path / "theirs")
    if config.moe and fields["target_modules"] == "all-linear":
        with pytest.raises(ValueError, match=r"alpha_pattern is .*; rank_pattern is .*; target_parameters is "):
            peft.load_adapter(tmp_path / "theirs", config)
        return
    chosen, adapter = peft.load_adapter(tmp_path / "theirs", config)
    config = dataclasses.replace(config, adapter=chosen)
    agree(config, base, adapter, theirs(torch, made))

    peft.save_adapter(tmp_path / "again", config, adapter, directory)
    again, before = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "theirs"))
    assert again.keys() == before.keys()
    same(again, before)
    raw, old = (read_json(tmp_path / name) for name in ("again", "theirs"))
    kept = ("peft_type", "task_type", "r", "lora_alpha", "use_rslora", "use_dora", "bias", "base_model_name_or_path")
    assert [raw[name] for name in kept] == [old[name] for name in kept]
