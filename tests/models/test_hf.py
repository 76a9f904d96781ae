"""Hugging Face directories: every form that is read, and one clear error for every other."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from models import tiny
from rljax.models import hf
from rljax.models.decoder import DecoderConfig

RAW = tiny.BASE | {"num_attention_heads": 4, "num_hidden_layers": 2}
WITHOUT_ROPE = DecoderConfig(37, 24, 2, 4, 4, 6, 20, max_positions=64, norm_epsilon=1e-2, tied=False)


def make(directory, changes=None, tensors=None, **options):
    raw = {name: value for name, value in (RAW | (changes or {})).items() if value is not ...}
    return tiny.write(directory, raw, tiny.tensors_of(RAW) if tensors is None else tensors, **options)


def read(directory):
    config = hf.read_config(directory)
    return config, hf.load(directory, config)


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {"rope_theta": 500.0}),
        ({"rope_theta": 500, "rope_scaling": None}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {"rope_theta": 500.0}),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_scaling": {"type": "default"}, "rope_theta": 500.0}, {"rope_theta": 500.0}),
        ({"rope_theta": ...}, {"rope_theta": 10_000.0}),
        ({"num_key_value_heads": None, "head_dim": None}, {}),
        ({"num_key_value_heads": 2, "head_dim": 8}, {"kv_heads": 2, "head_dim": 8}),
        ({"tie_word_embeddings": ...}, {}),
        ({"tie_word_embeddings": True}, {"tied": True}),
    ],
)
def test_fields_old_and_new(fields, changes, tmp_path):
    directory = make(tmp_path, {"rope_theta": 500.0} | fields)
    want = dataclasses.replace(WITHOUT_ROPE, **{"rope_theta": 500.0} | changes)
    assert hf.read_config(directory) == want
    assert hf.read_config(str(directory), remat="dots") == dataclasses.replace(want, remat="dots")


def test_files_in_parts_hold_the_same(tmp_path):
    whole, parts = (make(tmp_path / str(files), files=files) for files in (1, 2))
    assert len(list(parts.glob("*.safetensors"))) == 2
    jax.tree.map(np.testing.assert_array_equal, read(whole)[1], read(parts)[1])


def test_a_tied_table_may_be_stored_twice(tmp_path):
    changes, tensors = {"tie_word_embeddings": True}, tiny.tensors_of(RAW)
    alone = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    twice = read(make(tmp_path / "twice", changes, tensors))[1]
    assert "head" not in twice
    jax.tree.map(np.testing.assert_array_equal, twice, read(make(tmp_path / "once", changes, alone))[1])


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


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; legal: 'llama'"),
        ({"model_type": ...}, "model_type is None; legal: 'llama'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'; legal: 'default'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type is 'linear'; legal: 'default'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq.*; legal: None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; legal: 'silu'"),
        ({"attention_bias": True}, "attention_bias is True; legal: False"),
        ({"mlp_bias": True}, "mlp_bias is True; legal: False"),
        ({"vocab_size": ..., "rms_norm_eps": ...}, "lacks vocab_size, rms_norm_eps; a decoder needs .*hidden_size"),
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
