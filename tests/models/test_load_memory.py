"""A model is loaded without a second copy of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rljax.models import hf, layout

QWEN = {  # Qwen2.5-0.5B
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
LOADING = """
import sys, threading
import jax, jax.numpy as jnp
from rljax.models import hf, layout

def resident():
    return 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))

config = hf.read_config(sys.argv[1])
jnp.ones(3).block_until_ready()
before, seen, done = resident(), [], threading.Event()
watch = threading.Thread(target=lambda: [seen.append(resident()) for _ in iter(lambda: done.wait(0.002), True)])
watch.start()
params = jax.block_until_ready(hf.load(sys.argv[1], config, dtype=jnp.bfloat16))
seen.append(resident())
done.set()
watch.join()
print(max(seen) - before, params["layers"][0]["mlp"]["down"].dtype)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc tells of resident memory on Linux only")
@pytest.mark.parametrize(
    ("layers", "vocabulary", "least"),
    [(6, 60_000, 0.28e9), pytest.param(24, 151_936, 0.98e9, marks=pytest.mark.nightly)],
)
def test_half_a_billion_parameters_come_in_once(layers, vocabulary, least, tmp_path):
    """Or a third of that."""
    if shutil.disk_usage(tmp_path).free < 3 * least:
        pytest.skip("the checkpoint wants room on the disk")
    sizes = {"num_hidden_layers": layers, "vocab_size": vocabulary}
    (tmp_path / "config.json").write_text(json.dumps(QWEN | sizes))
    noise = np.random.default_rng(0).standard_normal(2**20, np.float32).astype(ml_dtypes.bfloat16)
    pieces = [piece for (piece,) in layout.tensor_slices(hf.read_config(tmp_path)).values()]
    shapes = {p.name: (p.rows,) if p.columns is None else (p.rows, p.columns) for p in pieces}
    save_file({name: np.resize(noise, shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size > least
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], check=True, capture_output=True, text=True, env=os.environ
    )
    grown, dtype = done.stdout.split()
    assert dtype == "bfloat16"
    assert int(grown) <= 1.3 * size
