"""Training runs of TRL 1.16, step by step through our `make_update`: the same batches, the same numbers.

    python -m pytest tests/test_replay.py --replay-dir DIR -rP   # default: peers/trl_replay/ of the shared folder

Of every case of DIR/manifest.json: each step's loss, each gradient norm before clipping, and the weights at the end,
written as DIR/<model> stores them. Where a run asks for nothing else, the objective is that of experiments/sft.py,
dpo.py or grpo.py itself. Case by case the manifest says trainer (by the keys of its batches), arguments and
model; tests/replay holds the tables from TRL's names to our functions, and refuses by name what they lack. With
gradient_accumulation_steps A, step s is one optimizer batch of ours, cut into A micro-batches.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rljax.models import hf
from rljax.models.families import read_config
from rljax.train.update import make_update
from rljax.types import TrainState
from tests.conftest import NO_SHARED, SHARED
from tests.replay import batches
from tests.replay.arguments import Unsupported, arguments_of, trainer_of
from tests.replay.methods import method_of, optimizer_of, policy_of

LIMITS = {  # |ours - TRL's| <= absolute + relative · |TRL's|
    "loss": (1e-5, 1e-6),  # a float32 of 50 (sppo_hard, ipo) has no more digits
    "gradient norm": (1e-7, 1e-4),  # the floor is for gradients that are zero but for rounding
    "weights": (1e-4, 0.0),
}
# Adam makes a step of full size of a gradient that is rounding only. Weights that once had one below this share of the
# largest in their tensor are not compared; there may be few of them (measured: 2 to 4 of 95,296 in five steps, and all
# the weights that were more than 5e-5 apart).
NOISE, FEW = 1e-6, 1e-3
# A run that is beyond its limits by less than this factor is repeated in float64, and judged by that: only TRL's own
# rounding is left then.
ROUNDING = 10.0


class Case(NamedTuple):
    """One recorded run."""

    name: str
    model: Path  # Hugging Face directory of the weights it starts from
    given: dict  # the trainer's arguments, as the manifest has them
    logs: list[dict]  # what it logged, step by step
    micro: list[dict]  # micro-batches: key -> array
    loss: np.ndarray  # [steps]
    grad_norm: np.ndarray  # [steps]
    final: dict  # stored tensor -> weights at the end


class Gap(NamedTuple):
    """One number of ours and TRL's."""

    what: str
    where: str
    ours: float
    theirs: float

    @property
    def excess(self) -> float:
        """Over 1: beyond the limit."""
        absolute, relative = LIMITS[self.what]
        apart = abs(self.ours - self.theirs) / (absolute + relative * abs(self.theirs))
        return apart if math.isfinite(apart) else math.inf

    def __str__(self) -> str:
        apart, (absolute, relative) = abs(self.ours - self.theirs), LIMITS[self.what]
        limit = f"{absolute:.0e} + {relative:.0e} · TRL's" if relative else f"{absolute:.0e}"
        return f"{self.what}, {self.where}: ours {self.ours:.8g}, TRL's {self.theirs:.8g}, {apart:.2e} apart > {limit}"


def pytest_generate_tests(metafunc):
    if {"directory", "name"} <= set(metafunc.fixturenames):
        given = metafunc.config.getoption("--replay-dir")
        directory = Path(given or SHARED / "peers" / "trl_replay")
        manifest = directory / "manifest.json"
        if given and not manifest.is_file():
            raise pytest.UsageError(f"--replay-dir {given}: no manifest.json there")
        found = list(json.loads(manifest.read_text())["cases"]) if manifest.is_file() else []
        absent = [pytest.param(None, None, marks=pytest.mark.skip(reason=NO_SHARED))]
        cases = [(directory, name) for name in found]
        metafunc.parametrize(("directory", "name"), cases or absent, ids=found or None)


def read(directory: Path, name: str) -> Case:
    about = json.loads((directory / "manifest.json").read_text())["cases"][name]
    with np.load(directory / f"traj_{name}.npz") as z:
        arrays = {key: z[key] for key in z.files}
    micro = [{} for _ in range(about["batches"])]
    for key, value in arrays.items():
        head, _, tail = key.partition("/")
        if tail and head != "final":
            micro[int(head.removeprefix("b"))][tail] = value
    final = {key.removeprefix("final/"): value for key, value in arrays.items() if key.startswith("final/")}
    logs = [entry for entry in about["logs"] if "loss" in entry]
    facts = (about["args"], logs, micro, arrays["loss"], arrays["grad_norm"], final)
    return Case(name, directory / about["model"], *facts)


def windows(case: Case, accumulation: int) -> list[list[dict]]:
    """The micro-batches of each step: `accumulation` of them, but for the last step of an epoch, which takes what is
    left. Where epochs end so, the log tells how much of an epoch, and so how many micro-batches, each step ends at."""
    ends = [*range(accumulation, len(case.micro), accumulation), len(case.micro)]
    if len(ends) != len(case.loss):
        epochs = [entry.get("epoch", 0.0) for entry in case.logs]
        ends = [round(epoch / epochs[-1] * len(case.micro)) for epoch in epochs] if epochs and epochs[-1] else []
    counts = np.diff([0, *ends])
    if len(ends) != len(case.loss) or not ((counts > 0) & (counts <= accumulation)).all():
        raise Unsupported(f"{len(case.micro)} micro-batches, {accumulation} a step, are not {len(case.loss)} steps")
    return [case.micro[end - count : end] for end, count in zip(ends, counts, strict=True)]


def rates(case: Case, constant: float, kind: str) -> list[float]:
    """The learning rate of each step, as logged; else the constant one."""
    logged = [entry["learning_rate"] for entry in case.logs if "learning_rate" in entry]
    if len(logged) == len(case.loss):
        return logged
    if kind != "constant":
        raise Unsupported(f"lr_scheduler_type = {kind!r} without a logged learning_rate of every step")
    return [constant] * len(case.loss)


def replay(case: Case, dtype=jnp.float32) -> list[Gap]:
    """Every number of the recorded run beside ours, which is computed in `dtype`."""
    trainer = trainer_of(set.union(*map(set, case.micro)))
    args = arguments_of(trainer, case.given)
    config = replace(read_config(case.model), dtype=dtype)
    if config.moe is not None and case.given.get("router_aux_loss_coef") != 0:
        raise Unsupported(f"{case.model}: a mixture, whose balancing loss rljax has not; router_aux_loss_coef 0 only")
    load = lambda: {"decoder": hf.load(case.model, config, dtype=dtype)}  # noqa: E731  anew: an update donates what it is given
    sizes = [batches.size(trainer, micro) for micro in case.micro]
    rows, columns = (max(side) for side in zip(*sizes, strict=True))
    uneven = len({count for count, _ in sizes}) > 1
    if uneven and trainer == "grpo":
        raise Unsupported("micro-batches of GRPO with different numbers of rows")

    method = method_of(trainer, policy_of(case.model, config), args, load(), uneven)
    optimizer = optimizer_of(args, rates(case, args.learning_rate, args.lr_scheduler_type))
    steps = windows(case, args.gradient_accumulation_steps)
    update = {n: make_update(method.objective(n), optimizer, n) for n in {len(window) for window in steps}}
    params = load()
    start = {"params": params, "opt_state": optimizer.init(params), "key": jax.random.key(0)}
    state = TrainState(step=jnp.zeros((), int), coefficients=method.start, **start)

    gaps = []
    for s, window in enumerate(steps):
        state, metrics = update[len(window)](state, method.batch(state, window, rows, columns))
        state = method.follow(state, metrics)
        gaps.append(Gap("loss", f"step {s}", float(metrics["loss"]), float(case.loss[s])))
        gaps.append(Gap("gradient norm", f"step {s}", float(metrics["grad_norm"]), float(case.grad_norm[s])))
    stored = lambda tree: dict(hf.named_tensors(config, tree["decoder"], hf.has_fused_projections(case.model)))  # noqa: E731
    return gaps + weight_gaps(case, stored(state.params), stored(state.opt_state[0]))


def weight_gaps(case: Case, ours: dict, least_gradient: dict) -> list[Gap]:
    """The entry of each stored tensor that is furthest from TRL's, among those whose gradients were never noise."""
    theirs = {name: x for name, x in case.final.items() if name in ours or name != "lm_head.weight"}  # tied: once
    assert set(theirs) == set(ours), f"{case.name}: tensors {sorted(set(theirs) ^ set(ours))} are on one side only"
    known = {name: share >= NOISE for name, share in least_gradient.items()}
    noise = np.mean(np.concatenate([~x.ravel() for x in known.values()]))
    assert noise < FEW, f"{case.name}: {noise:.1%} of the gradients are rounding: nothing to compare"
    gaps = []
    for name, want in theirs.items():
        assert ours[name].shape == want.shape, f"{case.name}: {name} is {ours[name].shape} here, {want.shape} there"
        worst = np.unravel_index(np.argmax(np.abs(ours[name] - want) * known[name]), want.shape)
        at = f"{name}[{', '.join(map(str, worst))}] at the end"
        gaps.append(Gap("weights", at, float(ours[name][worst]), float(want[worst])))
    return gaps


def largest(gaps: list[Gap]) -> str:
    """How close it was: absolute differences, of the gradient norm relative ones."""
    apart = dict.fromkeys(LIMITS, 0.0)
    for gap in gaps:
        scale = max(abs(gap.theirs), 1e-3) if gap.what == "gradient norm" else 1.0
        apart[gap.what] = max(apart[gap.what], abs(gap.ours - gap.theirs) / scale)
    return ", ".join(f"{what} {value:.1e}" for what, value in apart.items())


def test_every_recorded_run(directory, name):
    case = read(directory, name)
    gaps = replay(case)
    print(f"{name}: largest differences: {largest(gaps)}")
    if 1 < max(gap.excess for gap in gaps) < ROUNDING:
        with jax.enable_x64(True):
            gaps = replay(case, jnp.float64)
        print(f"{name}: in float64: {largest(gaps)}")
    beyond = [f"{name}: {gap}" for gap in gaps if gap.excess > 1]
    assert not beyond, "\n".join([f"{len(beyond)} of {len(gaps)} numbers are beyond their limit", *beyond[:8]])


@pytest.mark.parametrize(
    ("trainer", "given", "named"),
    [
        ("sft", {"learning_rat": 1e-3}, "learning_rat"),
        ("sft", {"beta": 0.1}, "beta"),
        ("sft", {"neftune_noise_alpha": 5.0}, "neftune_noise_alpha = 5.0"),
        ("dpo", {"rpo_alpha": 1.0}, "rpo_alpha"),
        ("dpo", {"loss_type": ["aot"], "ld_alpha": 0.5}, "ld_alpha"),
        ("grpo", {"importance_sampling_level": "word"}, "importance_sampling_level = 'word'"),
        ("grpo", {"bf16": True}, "bf16 = True"),
    ],
)
def test_an_argument_that_is_not_known_is_refused_by_name(trainer, given, named):
    with pytest.raises(Unsupported, match=re.escape(named)):
        arguments_of(trainer, given)


@pytest.mark.parametrize(
    ("trainer", "given", "named"),
    [
        ("sft", {"loss_type": "nlll"}, "loss_type = 'nlll'"),
        ("sft", {"optim": "adafactor"}, "optim = 'adafactor'"),
        ("dpo", {"loss_type": ["sigmoid", "simpo"]}, "loss_type = 'simpo'"),
        ("dpo", {"f_divergence_type": "total"}, "f_divergence_type = 'total'"),
        ("grpo", {"loss_type": "gmpo"}, "loss_type = 'gmpo'"),
    ],
)
def test_a_name_without_a_function_is_refused(trainer, given, named):
    args, policy = arguments_of(trainer, given), lambda params, frozen, traj: None
    with pytest.raises(Unsupported, match=re.escape(named)):
        _ = method_of(trainer, policy, args, {}, False), optimizer_of(args, [1e-3])


def test_batches_that_no_trainer_has_are_refused_by_their_keys():
    with pytest.raises(Unsupported, match="pixel_values"):
        trainer_of({"input_ids", "labels", "pixel_values"})
    with pytest.raises(Unsupported, match="KL_input_ids"):
        trainer_of({"KL_input_ids"})
