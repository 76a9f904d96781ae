"""Eight CPU devices, strict shapes, warnings as errors, one compilation cache for every test run of this user."""

import gc
import importlib.metadata
import itertools
import os
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# By environment, so that the processes which tests start inherit it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.environ.get("RLJAX_CACHE") or str(Path.home() / ".cache" / "rljax" / "xla")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Most of what the tests take is XLA compiling thousands of small programs. Without optimizing, one takes about a
# quarter of the CPU time (jaxlib 0.10.2: 64 ms became 16). `make nightly` also runs them with XLA's own settings.
QUICKLY = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones lack this flag, and stop at an unknown one
    QUICKLY.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICKLY))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Not rljax.types: vmap, scan and tree.map rebuild its dataclasses with leaves that are no arrays.
jaxtyping.install_import_hook(["rljax.ops", "rljax.algorithms"], "beartype.beartype")

# The checkout itself: worker processes find a function that a test hands to them as tests.rewards.test_pool.
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

# The first example compiles, which no deadline foresees, and slow machines take long to draw them, too; a run that can
# be repeated beats one more random example.
slow = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("rljax", deadline=None, derandomize=True, suppress_health_check=slow)
hypothesis.settings.load_profile("rljax")

SHARED = Path(os.environ.get("RLJAX_SHARED") or ROOT.parent / "shared")
NO_SHARED = "the shared folder is absent (RLJAX_SHARED)"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of what is too large for the repository: data/, models/, peers/."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


# XLA keeps some four memory maps for each compiled program; Linux allows a process 65,530, and the next is a crash.
MAPS, finished = Path("/proc/self/maps"), itertools.count(1)


def pytest_runtest_teardown(item):
    """Compiled programs are given up before there are too many; what is needed again comes from the files' cache."""
    if next(finished) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 40_000:
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish(session):
    """The garbage collector no longer looks through all of jax again and again, which was a tenth of the CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


def pytest_collection_modifyitems(config, items):
    """With --shuffle SEED: the files in a random order, and the tests of each."""
    seed = config.getoption("--shuffle")
    if seed is not None:
        draw = random.Random(seed)
        place = {item.path: draw.random() for item in items}
        items.sort(key=lambda item: (place[item.path], draw.random()))


left_out: list[str] = []  # a mark for each test that is not selected


def pytest_deselected(items):
    left_out.extend(mark for item in items for mark in ("parity", "nightly") if mark in item.keywords)


def pytest_sessionfinish(session):
    """Where tests run in several processes, one of those, which all collect the same, tells the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    left_out[:] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter):
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])]
    counts = {
        NO_SHARED: sum(NO_SHARED in reason for reason in reasons),
        "torch is absent": sum("torch" in reason for reason in reasons),
        "make parity runs them": left_out.count("parity"),
        "make nightly runs them": left_out.count("nightly"),
    }
    for why, count in counts.items():
        if count:
            terminalreporter.write_line(f"not run: {count:4d} tests, {why}")


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in a random order")
    parser.addoption("--golden-dir", help="other recorded outputs of the peers (tests/test_golden.py)")
    parser.addoption("--replay-dir", help="recorded training runs of TRL (tests/test_replay.py)")
