"""rljax against transformers' generate, on real weights: greedy completions token by token, and what a draw is made of.

Needs torch: make parity.
"""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from rljax.data.files import read_table
from rljax.data.tokenizer import load_tokenizer
from rljax.models import decoder, hf
from rljax.rollouts import sample_token as step
from rljax.rollouts.sampler import init_penalty_state, sample, sampling_settings, to_device
from rljax.types import Sampling
from rollouts.common import rows_of

pytestmark = pytest.mark.parity

UNKNOWN, END, PERIOD = 0, 2, 426  # tokens of stories260k; UNKNOWN pads
VOCABULARY, NEW, LONGEST = 512, 100, 60
OPENINGS = Path(__file__).parents[2] / "experiments" / "story_openings.jsonl"


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="torch is absent")


@pytest.fixture(scope="module")
def stories(shared):
    return shared / "models" / "stories260k"


@pytest.fixture(scope="module")
def model(torch, stories):
    from experiments.tools.check_parity import load_torch_model

    return load_torch_model(stories)


@pytest.fixture(scope="module")
def ids(stories):
    """64 beginnings of texts, of 1 to 60 tokens: each opening with those after it, cut."""
    openings = [row["prompt"] for row in read_table(OPENINGS).rows]
    tokenizer = load_tokenizer(stories)
    assert tokenizer.stop == (END,)
    assert tokenizer.decode([PERIOD]) == "."
    texts = [". ".join((openings + openings)[i : i + 12]) for i in range(64)]
    cut = [tokenizer.encode(text)[: 1 + i % LONGEST] for i, text in enumerate(texts)]
    assert {len(tokens) for tokens in cut} == set(range(1, LONGEST + 1))
    return cut


def generate(torch, model, rows, **settings):
    """What transformers' generate returns for a batch padded on the left."""
    tokens, mask = (torch.tensor(x).long() for x in (rows.tokens, rows.mask))
    with torch.no_grad():
        return model.generate(tokens, attention_mask=mask, pad_token_id=UNKNOWN, **settings)


def upto_stop(tokens, stop) -> list[int]:
    """A completion, its stop token included."""
    tokens = tokens.tolist()
    return tokens[: 1 + next((t for t, token in enumerate(tokens) if token in stop), len(tokens))]


# -------------------------------------------------------------------------------------------------- greedy completions


@pytest.mark.parametrize(
    ("stop", "ours", "theirs"),
    [
        ((END,), {}, {}),
        ((END, PERIOD), {}, {}),
        (
            (END, PERIOD),
            {"repetition_penalty": 1.3, "min_tokens": 20},
            {"repetition_penalty": 1.3, "min_new_tokens": 20},
        ),
    ],
    ids=["to the limit", "to a period", "penalty and minimum"],
)
def test_greedy_completions_are_the_same_tokens(torch, model, stories, ids, stop, ours, theirs):
    """All of them, up to the stop token: the two likeliest logits are nowhere closer than 2e-4, ten times what float32
    rounding makes of them. Transformers' penalty counts the padding as said: <unk> here, which is never likely.
    """
    config = hf.read_config(stories)
    lm, params = decoder.language_model(config), {"decoder": hf.load(stories, config)}
    rows = rows_of(ids, range(64), LONGEST)
    out = generate(torch, model, rows, do_sample=False, max_new_tokens=NEW, eos_token_id=list(stop), **theirs)
    expected = [upto_stop(row, stop) for row in out[:, LONGEST:]]
    assert PERIOD not in stop or len({len(row) for row in expected}) > 8  # else stopping has not been tested
    sampling = Sampling(temperature=0.0, max_tokens=NEW, stop=stop, logp="policy", **ours)
    for max_concurrent in (None, 16):
        traj = sample(lm, params, {}, rows, sampling.replace(max_concurrent=max_concurrent), 0, 0)
        completions = [np.asarray(a)[m].tolist() for a, m in zip(traj.actions, traj.mask, strict=True)]
        assert completions == expected
        ended = [completion[-1] in stop for completion in expected]
        np.testing.assert_array_equal(np.asarray(traj.terminated).any(axis=1), ended)


# ----------------------------------------------------------------------------------------------- what a draw is made of


def drawn_from(monkeypatch, logits, rows, t, sampling):
    """The masses [B V] from which rljax draws the t-th token after these rows."""
    seen = []

    def invert_cdf(masses, uniform):
        seen.append(np.asarray(masses))
        return masses.argmax(axis=-1)

    monkeypatch.setattr(step.ops, "invert_cdf", invert_cdf)
    prompts = to_device(rows, 0)
    penalties = init_penalty_state(prompts, sampling, VOCABULARY)
    settings = sampling_settings(prompts, sampling, jnp.int32(0))
    step.sample_token(jnp.asarray(logits), t, settings, penalties, sampling)
    return seen[0]


def assert_same_draw(masses, scores):
    """The same tokens may be drawn, with log-probs within 1e-5. scores [B V]: transformers', -inf where excluded."""
    kept = np.isfinite(scores)
    np.testing.assert_array_equal(masses > 0, kept)
    with np.errstate(divide="ignore"):
        ours = np.log(np.float64(masses)) - np.log(masses.sum(axis=-1, keepdims=True, dtype=np.float64))
    np.testing.assert_allclose(ours[kept], log_softmax(np.float64(scores), axis=-1)[kept], rtol=0, atol=1e-5)


def processors(t, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None, min_tokens=None):
    """Transformers', in the order of its generate; after rows of LONGEST columns, the last t the completion's."""
    from transformers.generation import logits_process as all_of

    made = [
        repetition_penalty and all_of.RepetitionPenaltyLogitsProcessor(repetition_penalty),
        min_tokens and all_of.MinNewTokensLengthLogitsProcessor(LONGEST - t, min_tokens, [END, PERIOD]),
        all_of.TemperatureLogitsWarper(temperature),
        top_k and all_of.TopKLogitsWarper(top_k),
        top_p and all_of.TopPLogitsWarper(top_p),
        min_p and all_of.MinPLogitsWarper(min_p),
    ]
    return all_of.LogitsProcessorList(filter(None, made))


ALL = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2, "min_tokens": 10}


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6},
        {"top_k": 1},
        {"top_k": 50},
        {"top_p": 0.1},
        {"top_p": 0.9},
        {"top_p": 0.9, "temperature": 1.7},
        {"top_k": 20, "top_p": 0.7},
        {"min_p": 0.05},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.7},
        {"min_tokens": 4},
        {"min_tokens": 3},
        ALL,
    ],
    ids=str,
)
def test_processed_logits(torch, monkeypatch, settings):
    """Random logits after random texts of one length, three tokens of them the completion's."""
    random = np.random.default_rng(0)
    logits = np.float32(random.normal(size=(64, VOCABULARY)) * random.uniform(0.1, 6.0, (64, 1)))
    rows = rows_of(random.integers(VOCABULARY, size=(64, LONGEST)).tolist(), range(64), LONGEST)
    scores = processors(3, **settings)(torch.tensor(rows.tokens).long(), torch.tensor(logits)).numpy()
    sampling = Sampling(max_tokens=NEW, stop=(END, PERIOD), **settings)
    assert_same_draw(drawn_from(monkeypatch, logits, rows, 3, sampling), scores)


def test_ties(torch, monkeypatch):
    """Where tokens tie at its threshold, transformers' top_p keeps some of them, by their place; rljax keeps all. Its
    top_k keeps all, as rljax does."""
    logits = np.log(np.tile(np.float32([0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.05]), (2, 64)) / 64)
    rows = rows_of([[1] * LONGEST] * 2, range(2), LONGEST)
    text = torch.tensor(rows.tokens).long()
    top_k = processors(0, top_k=100)(text, torch.tensor(logits)).numpy()
    assert (np.isfinite(top_k).sum(axis=-1) == 64 * 6).all()
    assert_same_draw(drawn_from(monkeypatch, logits, rows, 0, Sampling(top_k=100)), top_k)
    top_p = np.isfinite(processors(0, top_p=0.55)(text, torch.tensor(logits)).numpy())
    kept = drawn_from(monkeypatch, logits, rows, 0, Sampling(top_p=0.55)) > 0
    assert (kept >= top_p).all()
    assert (top_p.sum(axis=-1) < 64 * 6).all()
    np.testing.assert_array_equal(kept, logits >= np.log(np.float32(0.1) / 64))


def test_all_settings_through_generate(torch, model, monkeypatch, ids):
    """Every draw of eight completions that transformers sampled: its own logits, texts and order of processors."""
    prompts = [ids[i][:12] for i in range(20, 28)]
    settings = ALL | {"min_new_tokens": ALL["min_tokens"], "eos_token_id": [END, PERIOD], "max_new_tokens": 24}
    del settings["min_tokens"]
    torch.manual_seed(0)
    out = generate(
        torch,
        model,
        rows_of(prompts, range(8), 12),
        do_sample=True,
        output_scores=True,
        output_logits=True,
        return_dict_in_generate=True,
        **settings,
    )
    texts, logits, scores = out.sequences.numpy(), np.stack(out.logits, axis=1), np.stack(out.scores, axis=1)
    going = [np.isin(text[12:], [END, PERIOD]).cumsum() - np.isin(text[12:], [END, PERIOD]) == 0 for text in texts]
    places = np.argwhere(going)
    assert len(places) > 80
    row, t = places.T
    whole = rows_of([texts[r, : 12 + s].tolist() for r, s in places], range(len(places)), LONGEST)
    sampling = Sampling(max_tokens=NEW, stop=(END, PERIOD), **ALL)
    assert_same_draw(drawn_from(monkeypatch, logits[row, t], whole, t, sampling), scores[row, t])
