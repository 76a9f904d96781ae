"""What XLA compiles and how long it takes, as JAX's monitoring tells: for the terminal and for `compile_seconds`."""

import threading
import time

import jax

from rljax.train.log import format_duration, log_info

EVENT = (
    "/jax/core/compile/backend_compile_duration"  # told when a compilation begins (scalar) and when it ends (duration)
)
SLOW_SECONDS = 5.0  # a compilation that takes so long is told of, then and when it ends


class CompileWatch:
    """Listens from `start` to `stop`. Programs that the compilation cache holds count too: reading them takes time."""

    def __init__(self):
        self._seconds = 0.0
        self._now: tuple[str, float] | None = None  # what is being compiled, and since when
        self._timer: threading.Timer | None = None  # says so where it takes long

    def start(self) -> None:
        jax.monitoring.register_scalar_listener(self._on_begin)
        jax.monitoring.register_event_duration_secs_listener(self._on_end)

    def stop(self) -> None:
        jax.monitoring.unregister_scalar_listener(self._on_begin)
        jax.monitoring.unregister_event_duration_listener(self._on_end)

    def take_seconds(self) -> float:
        """Seconds of compiling since they were last taken."""
        seconds = self._seconds
        self._seconds = 0.0
        return seconds

    def describe(self) -> str:
        """ "compiling update 0:12" while something is compiled, else nothing. Read by the thread that redraws."""
        now = self._now
        if now is None:
            return ""
        name, began = now
        return f"compiling {name} {format_duration(time.monotonic() - began)}"

    def _on_begin(self, event: str, value: float, **facts: str | int) -> None:
        if event != EVENT:
            return
        name = _name(facts)
        self._now = (name, time.monotonic())
        self._timer = threading.Timer(SLOW_SECONDS, log_info, [f"compiling {name} ..."], {"style": "dim"})
        self._timer.daemon = True
        self._timer.start()

    def _on_end(self, event: str, seconds: float, **facts: str | int) -> None:
        if event != EVENT:
            return
        self._now = None
        self._seconds += seconds
        if self._timer is not None:
            self._timer.cancel()
        if seconds >= SLOW_SECONDS:
            log_info(f"compiled {_name(facts)} in {format_duration(seconds)}", style="dim")


def _name(facts: dict) -> str:
    """The function's name: `update` of JAX's jit(update)."""
    name = str(facts.get("fun_name", "a program"))
    return name.removeprefix("jit(").removesuffix(")") if name.startswith("jit(") else name.removeprefix("jit_")
