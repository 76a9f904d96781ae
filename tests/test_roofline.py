"""The arithmetic of experiments/benchmarks/roofline.py against counts by hand; no clock decides anything here."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import roofline
from experiments.benchmarks.common import Workload
from experiments.benchmarks.roofline import Matmul, Rates, Work
from rljax.models.decoder import DecoderConfig

# 2 layers of 4 heads (2 for keys) of 8, width 16, MLP 24, vocabulary 64. A layer has 16 x 32 weights for queries,
# twice 16 x 16 for keys and values, 32 x 16 for their output, 3 · 16 x 24 of the MLP, and two norms of 16; at the end
# there is one more norm.
CONFIG = DecoderConfig(64, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=24)
LAYER = 16 * 32 + 2 * 16 * 16 + 32 * 16 + 3 * 16 * 24
WEIGHTS = 64 * 16 + 2 * (LAYER + 2 * 16) + 16
TABLE = 64 * 16
WORKLOAD = Workload(CONFIG, prompts=3, n=2, prompt_tokens=5, completion_tokens=4)


def flops(work: Work) -> int:
    return sum(matmul.flops for matmul in work.matmuls)


def test_passes_of_a_rollout():
    prefill, *steps = roofline.rollout_works(WORKLOAD, CONFIG)
    assert len(steps) == 3  # the prefill yields the first of 4 tokens
    assert flops(prefill) == 2 * (15 * 2 * LAYER + 3 * TABLE)
    assert prefill.bytes == 4 * WEIGHTS
    # Each of 3 prompts has 1 + 2 + 3 + 4 + 5 pairs; a pair is 8 multiply-adds for its score and 8 for its value.
    assert prefill.attention_flops == 2 * (2 * 4 * (8 + 8)) * 3 * 15
    for t, step in enumerate(steps, 1):
        assert flops(step) == 2 * 6 * (2 * LAYER + TABLE)
        assert step.attention_flops == 2 * (2 * 4 * (8 + 8)) * 6 * (5 + t)
        # The cache holds a key and a value of 2 heads of 8 for each token of 3 prompts and of 6 completions.
        assert step.bytes == 4 * (WEIGHTS + 2 * 2 * (2 * 8) * (3 * 5 + 6 * t))


def test_a_bfloat16_model_reads_half():
    half = DecoderConfig(64, 16, 2, 4, 2, 8, 24, dtype="bfloat16")
    for full_pass, half_pass in zip(
        roofline.rollout_works(WORKLOAD, CONFIG), roofline.rollout_works(WORKLOAD, half), strict=True
    ):
        assert 2 * half_pass.bytes == full_pass.bytes
        assert half_pass.matmuls == full_pass.matmuls


def test_passes_of_an_update():
    forward, backward, optimizer = roofline.update_works(WORKLOAD, CONFIG)
    tokens = 3 * 5 + 6 * 3  # prompts once; the last token of a completion is not read
    scored = 3 + 6 * 3  # the last token of a prompt is one hidden state for both of its completions
    assert flops(forward) == 2 * (tokens * 2 * LAYER + scored * TABLE)
    pairs = 3 * 15 + 6 * (6 + 7 + 8)
    assert forward.attention_flops == 2 * (2 * 4 * (8 + 8)) * pairs
    assert flops(backward) == 2 * flops(forward)
    assert backward.attention_flops == 2 * forward.attention_flops
    assert optimizer == Work((), 0, 7 * 4 * WEIGHTS)


def test_gradients_have_the_shapes_of_their_operands():
    left, right = roofline.gradients_of(Matmul(rows=5, inner=7, columns=11, count=2))
    assert left == Matmul(5, 11, 7, 2)  # [5 11] x [11 7]: the gradient of [5 7]
    assert right == Matmul(7, 5, 11, 2)  # [7 5] x [5 11]: the gradient of [7 11]


def rates_of(*works: Work, reading: float) -> Rates:
    return Rates({(2, 3, 5): 30.0, (4, 3, 5): 60.0}, {roofline.working_set(work.bytes): reading for work in works})


def test_a_pass_takes_the_longer_of_reading_and_computing():
    # 60 FLOPs three times at 30 a second and 120 at 60; attention's 90 at the faster rate: 6 + 2 + 1.5 s.
    work = Work((Matmul(2, 3, 5, count=3), Matmul(4, 3, 5)), 90, 1000)
    optimizer = Work((), 0, 800)
    assert roofline.pass_seconds(work, rates_of(work, reading=500.0)) == pytest.approx(9.5)
    assert roofline.pass_seconds(work, rates_of(work, reading=100.0)) == pytest.approx(1000 / 100)
    both = rates_of(work, optimizer, reading=100.0)
    assert roofline.least_seconds([work, optimizer], both) == pytest.approx(10.0 + 8.0)


@pytest.mark.parametrize("num_bytes", [5, 64, 1000, 15_819_776, 2**33 + 1])
def test_working_sets_are_at_most_a_fifth_smaller(num_bytes):
    assert 0.8 * num_bytes <= roofline.working_set(num_bytes) <= num_bytes
    assert roofline.working_set(roofline.working_set(num_bytes)) == roofline.working_set(num_bytes)


def test_a_share_above_1_is_refused():
    assert roofline.share(1.0, 4.0) == 0.25
    assert roofline.share(4.0, 4.0) == 1.0
    with pytest.raises(ValueError, match=r"3\.9.*4 s.*ceiling was measured too low"):
        roofline.share(4.0, 3.9)


@pytest.mark.parametrize("shape", [(64, 256, 512), (4288, 256, 512), (256, 4288, 1376), (2040, 512, 32768)])
def test_pieces_divide_the_longer_of_rows_and_inner(shape):
    pieces = roofline.cut(shape)
    kept = 1 if shape[0] >= shape[1] else 0
    for piece in pieces:
        assert piece[kept] == shape[kept]
        assert piece[2] == shape[2]
        assert piece[1 - kept] <= shape[1 - kept]
        assert roofline.flops_of(piece) <= roofline.SMALL
    assert shape in pieces or roofline.flops_of(shape) > roofline.SMALL


def test_loops_compute_what_they_time():
    """A rate of any layout is that of the product itself: 5 x 3 and 3 x 4 give 5 x 4, by all layouts alike."""
    left = np.arange(15.0, dtype=np.float32).reshape(5, 3)
    right = np.arange(12.0, dtype=np.float32).reshape(3, 4)
    for layout in roofline.LAYOUTS:
        first, second, out = layout.replace("->", ",").split(",")
        arrays = {"mk": left, "kn": right, "nk": right.T, "mn": np.zeros((5, 4)), "nm": np.zeros((4, 5))}
        operands = [jnp.asarray(arrays[letters], jnp.float32) for letters in (first, second, out)]
        found = roofline._repeat_matmul(*operands, layout, 3)
        expected = left @ right
        np.testing.assert_array_equal(found, expected if out == "mn" else expected.T)


@pytest.mark.parametrize("devices", [1, 3])
def test_rates_are_of_the_devices_that_the_work_uses(monkeypatch, devices):
    """Of the eight here; three split no number of pieces that one device has."""
    used = []
    over_rows = roofline._over_rows
    monkeypatch.setattr(roofline, "_over_rows", lambda number: used.append(number) or over_rows(number))
    monkeypatch.setattr(roofline, "LOOP_SECONDS", 0.0)
    assert roofline.read_rate(64, 1, devices) > 0
    assert roofline.matmul_rate((6, 2, 3), "float32", 1, devices) > 0
    assert set(used) == {1, devices}
