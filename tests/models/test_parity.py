"""rljax against transformers itself. Needs torch: make parity."""

import jax
import numpy as np
import pytest

from models import tiny
from rljax.models import hf

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    """Compiling is most of what a tiny model takes."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def check_parity():
    pytest.importorskip("torch", reason="torch is absent")
    from experiments.tools import check_parity

    return check_parity


def texts_of(name):
    return [ids.tolist() for ids in tiny.tokens_of(name)]


@pytest.mark.parametrize("name", tiny.CASES)
def test_tiny_models(check_parity, name, tmp_path):
    for what, difference in check_parity.compare(str(tiny.make(tmp_path, name)), texts_of(name)).items():
        at_most = difference.relative if what == "logits, through the cache" else difference.largest
        assert at_most <= 2e-5, what


@pytest.mark.parametrize("name", ["plain", "moe_mixed", "gemma3_nested", "phi3_long"])
def test_transformers_reads_what_rljax_writes(check_parity, name, tmp_path):
    from transformers import AutoModelForCausalLM

    made, written = tiny.make(tmp_path / "made", name), tmp_path / "written"
    config = hf.read_config(made)
    hf.save(written, config, hf.load(made, config), source=made, shard_bytes=9000)
    _, told = AutoModelForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(told.values()), told
    said, of_made = (
        check_parity.transformers_outputs(str(directory), texts_of(name))[0] for directory in (written, made)
    )
    for ours, theirs in zip(said, of_made, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_head_with_other_values_is_not_tied(check_parity, tmp_path):
    config = tiny.config_of("grouped") | {"tie_word_embeddings": True}
    tensors = tiny.tensors_of(tiny.config_of("grouped"))
    assert not np.array_equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    directory = tiny.write(tmp_path / "other", config, tensors)
    with pytest.warns(UserWarning, match="are not tied"):
        found = check_parity.compare(str(directory), texts_of("grouped"))
    for what, difference in found.items():
        assert difference.relative <= 2e-5, what


def test_stories260k(check_parity, shared, capsys):
    directory = str(shared / "models" / "stories260k")
    check_parity.main(check_parity.Config(directory))
    assert "all relative differences within 2e-05" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"above the tolerance of 1e-09: logits, teacher-forced; .*; log-probs"):
        check_parity.main(check_parity.Config(directory, tolerance=1e-9))


def test_a_wrong_epsilon_is_seen(check_parity, tmp_path, monkeypatch):
    """Transformers reads one directory, rljax another."""
    config = tiny.config_of("grouped")
    said = check_parity.transformers_outputs(str(tiny.make(tmp_path / "right", "grouped")), texts_of("grouped"))
    monkeypatch.setattr(check_parity, "transformers_outputs", lambda *_: said)
    wrong = tiny.write(tmp_path / "wrong", config | {"rms_norm_eps": 0.11}, tiny.tensors_of(config))
    found = check_parity.compare(str(wrong), texts_of("grouped"))
    assert min(difference.relative for difference in found.values()) > 2e-4
