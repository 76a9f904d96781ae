import jax
import jax.numpy as jnp
import pytest

from rljax.train import compile_watch
from rljax.train.compile_watch import CompileWatch
from rljax.train.machine import environment, peak_bytes


@pytest.fixture
def watch():
    """A watch, and what it says when a compilation ends: `said` is told before it."""
    watch, said = CompileWatch(), []

    def listen(event, seconds, **facts):
        if event == compile_watch.EVENT:
            said.append(watch.describe())

    jax.monitoring.register_event_duration_secs_listener(listen)
    watch.start()
    yield watch, said
    watch.stop()
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_compilation_is_named_while_it_lasts_and_counted_after(watch, monkeypatch, capsys):
    watch, said = watch
    monkeypatch.setattr(compile_watch, "SLOW_SECONDS", 0.0)

    @jax.jit
    def polish(x):
        return jnp.sin(x) + 17

    polish(jnp.ones(3)).block_until_ready()
    assert "compiling polish 0:00" in said
    assert watch.describe() == ""
    assert "compiled polish in 0:0" in capsys.readouterr().out
    assert watch.take_seconds() > 0
    assert watch.take_seconds() == 0
    polish(jnp.ones(3)).block_until_ready()
    assert watch.take_seconds() == 0  # it was compiled


def test_a_slow_compilation_is_told_of_before_it_ends(watch, monkeypatch, capsys):
    watch, _ = watch
    timers = []

    class Timer:
        """A timer whose time comes when the test says so."""

        def __init__(self, seconds, function, args, kwargs):
            self.tell = lambda: function(*args, **kwargs)
            self.cancelled = False

        def start(self):
            timers.append(self)

        def cancel(self):
            self.cancelled = True

    monkeypatch.setattr(compile_watch.threading, "Timer", Timer)
    jax.monitoring.record_scalar(compile_watch.EVENT, 0.0, fun_name="jit(update)")
    timers[0].tell()
    assert capsys.readouterr().out == "compiling update ...\n"
    assert not timers[0].cancelled
    jax.monitoring.record_event_duration_secs(compile_watch.EVENT, 61.0, fun_name="jit(update)")
    assert capsys.readouterr().out == "compiled update in 1:01\n"
    assert timers[0].cancelled


def test_other_events_are_none_of_its_business(watch):
    watch, _ = watch
    jax.monitoring.record_event_duration_secs("/jax/other", 3.0)
    jax.monitoring.record_scalar("/jax/other", 3.0)
    assert watch.take_seconds() == 0
    assert watch.describe() == ""


def test_facts_of_the_machine():
    facts = environment()
    assert facts["devices"] == jax.device_count()
    assert facts["backend"] == "cpu"
    assert all(facts.values())
    bound = jnp.ones(1).nbytes
    assert bound < peak_bytes()["peak_host_bytes"] < 1e13


def test_memory_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, peak):
            self.peak = peak

        def memory_stats(self):
            return {"peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(3), Device(7)])
    assert peak_bytes()["peak_device_bytes"] == 7.0
