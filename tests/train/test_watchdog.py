"""A run that no longer moves is ended with the code of "try again", and says where it stands."""

import subprocess
import sys

import jax
import pytest

from experiments.common import models
from models import tiny
from rljax.models import hf
from rljax.train import checkpoint, run, watchdog
from rljax.types import TrainState

HANGS = """
import time
from rljax.train.watchdog import Watchdog

def waits_for_a_partner_that_is_gone():
    time.sleep(600)

watchdog = Watchdog(floor_seconds=0.5)
watchdog.start()
watchdog.step_ended()
waits_for_a_partner_that_is_gone()
"""


def test_a_process_that_hangs_is_ended_and_its_stacks_are_printed():
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120)
    assert done.returncode == watchdog.EXIT_CODE == 75
    assert "error: no step or evaluation has ended for" in done.stderr
    assert "waits_for_a_partner_that_is_gone" in done.stderr


SIGNS = """
import time
from rljax.train.watchdog import Watchdog, sign_of_life

Watchdog(floor_seconds=2.0).start()
for _ in range(5):
    time.sleep(0.8)
    sign_of_life()
print("written", flush=True)
time.sleep(600)
"""


def test_signs_of_life_put_the_end_off_and_a_hang_after_the_last_one_is_ended():
    done = subprocess.run([sys.executable, "-c", SIGNS], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("written\n", watchdog.EXIT_CODE)


def test_evaluations_files_and_parameters_are_signs_of_life(tmp_path, monkeypatch):
    """What a run does after its last step: nothing else moves then."""
    signs = []
    for module in (checkpoint, models, run):
        monkeypatch.setattr(module, "sign_of_life", lambda: signs.append("sign"))
    (evaluate,) = run.Run(tmp_path / "run", {}, steps=1).timed(evaluate=lambda: 1)
    assert (evaluate(), len(signs)) == (1, 1)
    made = tiny.make(tmp_path / "model", "plain")
    config = hf.read_config(made)
    params = {"decoder": hf.load(made, config)}
    models.save_pretrained(params, {}, config, made, tmp_path / "written")
    assert len(signs) == 1 + len(jax.tree.leaves(params))
    checkpoints = checkpoint.Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, TrainState(1, params, (), jax.random.key(0)))
    checkpoints.close()
    files = [file for file in (tmp_path / "checkpoints" / "1").rglob("*") if file.is_file()]
    assert len(signs) == 1 + len(jax.tree.leaves(params)) + len(files)


def test_a_step_may_take_ten_times_the_median_and_never_less_than_the_floor(monkeypatch):
    clock = iter([0.0, 100.0, 103.0, 106.0, 109.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    watched = watchdog.Watchdog(floor_seconds=20.0)  # at 0
    assert watched.limit_seconds() == 20.0
    for _ in range(4):  # the first compiled for 100 seconds, which does not count in a median
        watched.step_ended()
    assert watched.limit_seconds() == 30.0
    assert watchdog.Watchdog.__init__.__defaults__ == (10.0, None)


def test_a_run_that_ended_is_not_watched_and_zero_switches_it_off(monkeypatch):
    ended = watchdog.Watchdog(floor_seconds=0.2)
    ended.start()
    ended.stop()  # else this process would end
    monkeypatch.setenv("RLJAX_WATCHDOG_SECONDS", "0")
    off = watchdog.Watchdog()
    off.start()
    assert off.floor_seconds == 0


def test_settings_that_no_watchdog_can_have():
    with pytest.raises(ValueError, match="legal: at least 1 and 0"):
        watchdog.Watchdog(factor=0.5)
    with pytest.raises(ValueError, match="legal: at least 1 and 0"):
        watchdog.Watchdog(floor_seconds=-1.0)
