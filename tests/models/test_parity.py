"""rljax against transformers itself. Needs torch: make parity."""

import pytest

from models import tiny

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def check_parity():
    pytest.importorskip("torch", reason="torch is absent")
    import check_parity

    return check_parity


@pytest.mark.parametrize("case", sorted(tiny.CASES))
def test_tiny_models(check_parity, case, tmp_path):
    texts = [ids.tolist() for ids in tiny.tokens_of(case)]
    for name, difference in check_parity.compare(str(tiny.make(tmp_path, case)), texts).items():
        assert difference.largest <= 2e-5, name


def test_stories260k(check_parity, shared, capsys):
    directory = str(shared / "models" / "stories260k")
    check_parity.main(check_parity.Config(directory))
    assert "all within 2e-05" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"above the tolerance of 1e-09: logits, teacher-forced; .*; log-probs"):
        check_parity.main(check_parity.Config(directory, tolerance=1e-9))


def test_a_wrong_epsilon_is_seen(check_parity, tmp_path, monkeypatch):
    """Transformers reads one directory, rljax another."""
    texts = [ids.tolist() for ids in tiny.tokens_of("grouped")]
    said = check_parity.transformers_says(str(tiny.make(tmp_path / "right", "grouped")), texts)
    monkeypatch.setattr(check_parity, "transformers_says", lambda *_: said)
    config = tiny.config_of("grouped")
    wrong = tiny.write(tmp_path / "wrong", config | {"rms_norm_eps": 1.1e-2}, tiny.tensors_of(config))
    assert min(difference.relative for difference in check_parity.compare(str(wrong), texts).values()) > 2e-4
