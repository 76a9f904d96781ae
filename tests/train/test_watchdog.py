"""A run that no longer moves is ended with the code of "try again", and says where it stands."""

import subprocess
import sys

import pytest

from rljax.train import watchdog

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
