"""Hugging Face directories: every form that is read, and one clear error for every other."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from models import tiny
from rljax.models import decoder, hf, rope, stored
from rljax.models.decoder import DecoderConfig
from rljax.train import mesh as meshes

RAW = tiny.case("llama", tiny.heads(4), num_hidden_layers=2)
WITHOUT_ROPE = DecoderConfig(37, 24, 2, 4, 4, 6, 20, max_positions=64, rms_norm_eps=1e-2, tie_word_embeddings=False)


def make(directory, changes=None, tensors=None, raw=RAW, **options):
    raw = {name: value for name, value in (raw | (changes or {})).items() if value is not ...}
    return tiny.write(directory, raw, tiny.tensors_of(RAW) if tensors is None else tensors, **options)


def read(directory):
    config = hf.read_config(directory)
    return config, hf.load(directory, config)


@pytest.mark.parametrize(
    ("fields", "theta", "changes"),
    [
        ({}, 500.0, {}),
        ({"rope_theta": 500, "rope_scaling": None}, 500.0, {}),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, 500.0, {}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}, 500.0, {}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 500.0}, 500.0, {}),
        ({"rope_theta": ...}, 10_000.0, {}),
        ({"num_key_value_heads": None, "head_dim": None}, 500.0, {}),
        ({"num_key_value_heads": 2, "head_dim": 8}, 500.0, {"num_kv_heads": 2, "head_dim": 8}),
        ({"tie_word_embeddings": ...}, 500.0, {}),
        ({"tie_word_embeddings": True}, 500.0, {"tie_word_embeddings": True}),
        ({"attention_bias": True, "mlp_bias": True}, 500.0, {"qkv_bias": True, "out_bias": True, "mlp_bias": True}),
    ],
)
def test_fields_of_a_llama(fields, theta, changes, tmp_path):
    directory = make(tmp_path, {"rope_theta": 500.0} | fields, {})
    want = dataclasses.replace(WITHOUT_ROPE, **changes)
    table = rope.Rope(tuple(np.float32(theta ** -(np.arange(0, want.head_dim, 2) / want.head_dim)).tolist()))
    config = hf.read_config(directory)
    for mine in config.ropes:
        np.testing.assert_allclose(mine.frequencies, table.frequencies, rtol=1e-6)
    assert dataclasses.replace(config, ropes=()) == want
    assert hf.read_config(str(directory), context=64) == config


FULL, SLIDING = tiny.FULL, tiny.SLIDING
OLD_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern", "partial_rotary_factor")
LOCAL_AND_GLOBAL = {
    FULL: {"rope_theta": 100.0, "rope_type": "linear", "factor": 4.0},
    SLIDING: {"rope_theta": 50.0, "rope_type": "default"},
}


@pytest.mark.parametrize(
    ("name", "new"),
    [
        ("llama_linear", tiny.rope(300.0, "linear", factor=2.5)),
        ("llama_yarn", tiny.rope(100.0, "yarn", **tiny.YARN)),
        ("mistral", tiny.rope(100.0)),
        ("qwen2", tiny.rope(1e3) | {"sliding_window": None, "layer_types": [FULL] * 3}),
        ("qwen2_windows", {"max_window_layers": ..., "layer_types": [FULL, FULL, SLIDING]}),
        ("qwen3_windows", tiny.rope(1e4) | {"layer_types": [FULL, SLIDING, SLIDING]}),
        ("moe", tiny.rope(1e3) | {"decoder_sparse_step": 1, "mlp_only_layers": None, "sliding_window": 2}),
        ("gemma2", tiny.rope(1e3) | {"layer_types": [SLIDING, FULL, SLIDING], "hidden_act": "gelu_pytorch_tanh"}),
        ("gemma3", {"rope_parameters": LOCAL_AND_GLOBAL, "layer_types": [SLIDING, SLIDING, FULL]}),
        ("smollm3_windows", {"no_rope_layers": [1, 0, 1], "layer_types": [FULL, SLIDING, FULL]}),
        ("olmo2", tiny.rope(1e3) | {"num_key_value_heads": 4}),
        ("phi3_short", tiny.rope(50.0, "longrope", **tiny.LONG)),
        ("phi3_partial", tiny.rope(1e4, partial_rotary_factor=0.5)),
    ],
)
def test_fields_old_and_new_mean_the_same(name, new, tmp_path):
    old, gone = tiny.config_of(name), dict.fromkeys(OLD_ROPE, ...) if "rope_parameters" in new else {}
    renewed = make(tmp_path / "new", gone | new, {}, old)
    assert hf.read_config(renewed) == hf.read_config(make(tmp_path / "old", {}, {}, old))


@pytest.mark.parametrize("name", sorted(tiny.CASES.keys() - {"mistral_types"}))  # that one it makes a Ministral
def test_what_transformers_saves_means_the_same(name, tmp_path):
    from transformers import AutoConfig

    directory = make(tmp_path / "hub", {}, {}, tiny.config_of(name))
    AutoConfig.from_pretrained(directory).save_pretrained(tmp_path / "saved")
    for context in (None, 13):
        assert hf.read_config(tmp_path / "saved", context) == hf.read_config(directory, context)


def test_files_in_parts_hold_the_same(tmp_path):
    whole, parts = (make(tmp_path / str(files), files=files) for files in (1, 2))
    assert len(list(parts.glob("*.safetensors"))) == 2
    jax.tree.map(np.testing.assert_array_equal, read(whole)[1], read(parts)[1])


TIED = {"tie_word_embeddings": True}
OTHER_HEAD = "lm_head.weight is stored with other values: they are not tied"


def test_a_tied_table_may_be_stored_twice(tmp_path):
    tensors = tiny.tensors_of(RAW)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    alone = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    config, twice = read(make(tmp_path / "twice", TIED, tensors))
    assert config == hf.read_config(make(tmp_path / "once", TIED, alone))
    assert "head" not in twice
    jax.tree.map(np.testing.assert_array_equal, twice, read(tmp_path / "once")[1])


@pytest.mark.parametrize("rows", [4096, 5])  # compared at a time: the last row of the table is in a block of its own
def test_a_head_with_other_values_is_not_tied(rows, tmp_path, monkeypatch):
    """Whatever the config says, and to the last value: the logits are those of the stored head."""
    monkeypatch.setattr(stored, "ROWS", rows)
    tensors = tiny.tensors_of(RAW)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1.0
    directory = make(tmp_path, TIED, tensors | {"lm_head.weight": head})
    with pytest.warns(UserWarning, match=OTHER_HEAD):
        config, params = read(directory)
    assert config == hf.read_config(make(tmp_path / "untied"))
    np.testing.assert_array_equal(params["head"], head.T)
    hidden = np.random.default_rng(0).standard_normal((3, config.hidden_size)).astype(np.float32)
    np.testing.assert_allclose(decoder.logits(config, params, hidden), hidden @ head.T, rtol=1e-4, atol=1e-5)


def test_a_head_of_other_shape_is_not_tied(tmp_path):
    directory = make(tmp_path, TIED, tiny.tensors_of(RAW) | {"lm_head.weight": np.zeros((38, 24), np.float32)})
    with (
        pytest.warns(UserWarning, match=OTHER_HEAD),
        pytest.raises(ValueError, match=r"lm_head.weight has shape \(38, 24\); config.json makes it \(37, 24\)"),
    ):
        read(directory)


@pytest.mark.parametrize(
    ("raw", "shapes"),
    [(RAW | {"tie_word_embeddings": True}, None), (tiny.config_of("gemma2"), tiny.shapes_of("gemma2"))],
)
def test_what_is_written_of_a_head_of_its_own_says_so(raw, shapes, tmp_path):
    """Both where the config says tied and where it says nothing, which means tied in a Gemma."""
    tensors = tiny.tensors_of(raw, shapes)
    tensors["lm_head.weight"] = 1.0 - tensors["model.embed_tokens.weight"]
    said = ... if shapes else True
    source = make(tmp_path / "source", {"tie_word_embeddings": said}, tensors, raw)
    with pytest.warns(UserWarning, match=OTHER_HEAD):
        config, params = read(source)
    hf.copy_sidecar_files(source, tmp_path / "run")
    hf.save(tmp_path / "written", config, params, source)
    hf.save(tmp_path / "exported", config, params, tmp_path / "run")
    assert hf.read_config(tmp_path / "run") == config  # without a warning
    for name in ("written", "exported"):
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False
        found, again = read(tmp_path / name)
        assert found == config
        jax.tree.map(np.testing.assert_array_equal, again, params)


def test_old_files_may_hold_rotary_tables(tmp_path):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    jax.tree.map(
        np.testing.assert_array_equal,
        read(make(tmp_path, None, tiny.tensors_of(RAW) | extra))[1],
        read(make(tmp_path))[1],
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_exactly(dtype, tmp_path):
    half = {name: tensor.astype(dtype) for name, tensor in tiny.tensors_of(RAW).items()}
    directory = make(tmp_path, None, half)
    config, params = read(directory)
    np.testing.assert_array_equal(params["embedding"], half["model.embed_tokens.weight"].astype(np.float32))
    kept = hf.load(directory, config, dtype=dtype)
    np.testing.assert_array_equal(kept["layers"][1]["mlp"]["down"], half["model.layers.1.mlp.down_proj.weight"].T)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("phi3", (1, 4, 2)),  # stored fused
        ("phi3_partial", (1, 2, 4)),
        ("moe", (2, 2, 2)),  # stored expert by expert
        ("moe_mixed", (1, 4, 2)),
        ("olmo2_grouped", (1, 4, 2)),  # norms and biases along the heads
        ("qwen3_windows", (1, 4, 2)),
    ],
)
def test_each_device_reads_its_own_part(name, shape, tmp_path):
    directory = tiny.make(tmp_path, name)
    config, whole = read(directory)
    places = meshes.param_shardings(meshes.make_mesh(*shape), decoder.param_axes(config), decoder.abstract(config))
    assert not any(place.is_fully_replicated for place in jax.tree.leaves(places["layers"][1]["mlp"]))
    parts = hf.load(directory, config, places)
    assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding.is_equivalent_to(place, x.ndim), parts, places))
    jax.tree.map(np.testing.assert_array_equal, parts, whole)


@pytest.mark.parametrize("name", tiny.CASES)
def test_what_is_written_is_what_was_read(name, tmp_path):
    directory, tensors = tiny.make(tmp_path / "made", name), tiny.tensors_of(tiny.config_of(name), tiny.shapes_of(name))
    hf.save(tmp_path / "written", *read(directory), source=directory, shard_bytes=9000)
    files = hf.stored_files(tmp_path / "written")
    assert len(set(files.values())) > 1
    assert files.keys() == tensors.keys()
    for name, file in files.items():
        with safe_open(file, framework="numpy") as opened:
            np.testing.assert_array_equal(opened.get_tensor(name), tensors[name])


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; legal: 'llama', 'mistral', 'qwen2'"),
        ({"model_type": ...}, "model_type is None; legal: 'llama'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_type is 'dynamic'; legal: 'default', "),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic'; legal: 'default', 'linear', "),
        ({"rope_parameters": {FULL: {"rope_type": "proportional"}}}, "rope_type is 'proportional'; legal: 'default'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor is 0\.5; legal: None, 1\.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; legal: None, 1\.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq.*; legal: None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; legal: 'silu', 'gelu_pytorch_tanh'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; legal: a divisor of 4"),
        ({"hidden_size": 26}, r"transformers refuses it: (.|\n)*hidden size \(26\) is not a multiple"),
        ({"rms_norm_eps": "small"}, r"transformers refuses it: (.|\n)*rms_norm_eps"),
        (
            tiny.config_of("smollm3_yarn") | {"no_rope_layers": [1, 0]},
            "transformers refuses it: list index out of range",
        ),
        ({"vocab_size": ..., "hidden_size": ...}, "lacks vocab_size, hidden_size; a decoder needs .*hidden_size"),
        (
            tiny.config_of("gemma2") | {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True; legal: None",
        ),
    ],
)
def test_settings_that_would_be_computed_wrongly(changes, message, tmp_path):
    with pytest.raises(ValueError, match=rf"config\.json.* {message}"):
        hf.read_config(make(tmp_path, changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "tensors missing model.norm.weight; not of this family none"),
        ({"lm_head.weight": None}, "tensors missing lm_head.weight"),
        (
            {f"model.layers.{i}.mlp.{n}_proj.weight": None for i in range(2) for n in ("up", "down", "gate")},
            r"missing model.layers.0.mlp.down_proj.weight, .* and 2 more",
        ),
        ({"model.layers.2.mlp.up_proj.weight": (20, 24)}, "not of this family model.layers.2.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": (24,)}, "not of this family model.layers.0.self_attn.q_proj.bias"),
        ({"model.layers.1.mlp.up_proj.weight": (24, 20)}, r"up_proj.weight has shape \(24, 20\); .* \(20, 24\)"),
        ({"model.embed_tokens.weight": (38, 24)}, r"embed_tokens.weight has shape \(38, 24\); .* \(37, 24\)"),
        ({"model.norm.weight": (1, 24)}, r"norm.weight has shape \(1, 24\); .* \(24,\)"),
        ({"model.layers.0.self_attn.o_proj.weight": (24, 12)}, r"o_proj.weight has shape \(24, 12\); .* \(24, 24\)"),
    ],
)
def test_tensors_that_do_not_fit(change, message, tmp_path):
    tensors = tiny.tensors_of(RAW)
    for name, shape in change.items():
        if shape is None:
            del tensors[name]
        else:
            tensors[name] = np.zeros(shape, np.float32)
    directory = make(tmp_path, None, tensors)
    with pytest.raises(ValueError, match=message):
        read(directory)


def test_a_llama_of_our_own_is_written_however_it_is_computed():
    llama = DecoderConfig(37, 32, 2, 2, 1, 16, 20)
    other = dataclasses.replace(llama, batch_invariant=True, fused_projections=True, dtype="bfloat16")
    assert hf.to_hf_config(other, (2,)) == hf.to_hf_config(llama, (2,))
    with pytest.raises(ValueError, match="this decoder has another qk_norm, activation; a decoder that was loaded"):
        hf.to_hf_config(dataclasses.replace(llama, qk_norm="head", activation="gelu_tanh"), (2,))


def test_no_directory(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model in .*absent: config\.json is missing"):
        read(tmp_path / "absent")


def test_pickled_weights_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(FileNotFoundError, match=r"no \*\.safetensors in .*; pickled weights .* are not read"):
        read(tmp_path)


def test_files_cut_short(tmp_path):
    directory = make(tmp_path)
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        read(directory)
    (directory / "config.json").write_text('{"model_type": "lla')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read(directory)
