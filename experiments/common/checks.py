"""What doctor.py checks, each as a function that returns what it found on this process.

Numbers are those of all processes. A check that needs them is a generator: it yields what this process has, and is sent
what all have, in their order. It exchanges nothing by itself, so that none waits for one whose check is over.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from packaging.requirements import Requirement

from experiments.common.chips import GIB, chip_of
from experiments.common.settings import MeshShape
from rljax.train import distributed
from rljax.train.mesh import make_mesh

SHOWN = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "libtpu")  # of the packages that are installed
VERDICTS = ("ok", "warning", "failed")


class Finding(NamedTuple):
    """What a check found on one process."""

    verdict: str  # one of VERDICTS
    text: str


Steps = Generator[Any, list, Finding]


# ------------------------------------------------------------------------------------------------ what is installed


def check_versions() -> Finding:
    """The packages that setup.py asks for, in the versions that it asks for."""
    found = [f"{name} {version}" for name in SHOWN if (version := installed(name))]
    text = ", ".join([f"python {platform.python_version()}", *found])
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("rljax") or []]
    except importlib.metadata.PackageNotFoundError:
        return Finding("warning", f"{text}; rljax is not installed: pip install -e .")
    needed = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    wrong = [
        f"{one.name} {installed(one.name) or 'is missing'} (wanted: {one})"
        for one in needed
        if not (version := installed(one.name)) or not one.specifier.contains(version, prereleases=True)
    ]
    if wrong:
        return Finding("failed", f"{text}; {', '.join(wrong)}: pip install -e .")
    return Finding("ok", text)


def installed(name: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_devices() -> Finding:
    """As many devices on every process, of one kind, and an accelerator where the machine has one."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    text = f"{jax.device_count()} {' and '.join(kinds)}, {jax.process_count()} processes with {counts[0]} each"
    if len({*counts}) > 1:
        return Finding("failed", f"processes have {counts} devices: one that has fewer lost some; restart its host")
    if len(kinds) > 1:
        return Finding("warning", f"{text}: the slowest kind sets the pace")
    idle = [path for path in ("/dev/nvidia0", "/dev/accel0") if os.path.exists(path)]
    if jax.default_backend() == "cpu" and idle and not os.environ.get("JAX_PLATFORMS"):
        extra = "gpu" if "nvidia" in idle[0] else "tpu"
        return Finding("warning", f"{text}, but there is a {idle[0]}: pip install -e '.[{extra}]'")
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if tasks > 1 and jax.process_count() == 1:
        return Finding("warning", f"{text}, but SLURM has {tasks} tasks: start it with srun")
    return Finding("ok", text)


def check_mesh(shape: MeshShape) -> Finding:
    """The axes of the mesh cover the devices, and tensor parallelism stays within a host of GPUs."""
    mesh = make_mesh(**shape.sizes)
    text = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    if mesh.devices.flat[0].platform == "gpu":
        processes = np.vectorize(lambda device: device.process_index)(mesh.devices)
        axis = mesh.axis_names.index("tensor")
        if (processes != processes.take([0], axis)).any():
            return Finding("warning", f"{text}: the tensor axis crosses hosts, whose network is slow; make it smaller")
    return Finding("ok", text)


def check_memory() -> Steps:
    """The least memory of a device and of a host among all."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    own_host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    own_limit = min(one["bytes_limit"] for one in stats) / GIB if all(stats) else None
    hosts, limits = zip(*(yield own_host, own_limit), strict=True)
    host = min(hosts)
    if None in limits:
        return Finding("ok", f"{host:.1f} GiB on a host, which its devices share")
    limit = min(limits)
    used = max(one["bytes_in_use"] for one in stats) / GIB
    text = f"{limit:.1f} GiB a device, {host:.1f} GiB on a host"
    if used > 0.1 * limit:
        return Finding("warning", f"{text}; {used:.1f} GiB of a device are in use already")
    return Finding("ok", text)


# ------------------------------------------------------------------------------------------------- speed, and sums


def check_matmul() -> Steps:
    """FLOP/s of each of this process's devices by itself. A device that is much slower than the others is broken."""
    on_cpu = jax.default_backend() == "cpu"
    size, dtype = (1024, jnp.float32) if on_cpu else (8192, jnp.bfloat16)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="default", preferred_element_type=jnp.float32))
    speeds = []
    for device in jax.local_devices():
        ones = jax.device_put(jnp.ones((size, size), dtype), device)
        if not (multiply(ones, ones) == size).all():
            return Finding("failed", f"{device}: a wrong product; take it out of service")
        speeds.append(2 * size**3 / median_seconds(lambda ones=ones: multiply(ones, ones)) / 1e12)
    everyone = yield speeds
    slowest, fastest = min(map(min, everyone)), max(map(max, everyone))
    text = f"{slowest:.3g} to {fastest:.3g} TFLOP/s a device in {jnp.dtype(dtype).name}"
    chip = chip_of(jax.devices()[0].device_kind)
    if chip:
        text += f", {slowest * 1e12 / chip.flops:.0%} of the published peak at least"
    if not on_cpu and min(speeds) < 0.8 * fastest:
        return Finding("warning", f"{text}; {jax.local_devices()[int(np.argmin(speeds))]} is slow: is it hot?")
    return Finding("ok", text)


def check_all_reduce() -> Steps:
    """The sum of an array over all devices, and the bandwidth of a device's links as NCCL's tests count it."""
    count = jax.device_count()
    if count == 1:
        return Finding("ok", "one device: nothing to reduce")
    size = (4 if jax.default_backend() == "cpu" else 256) * 2**18  # float32 numbers in 4 or 256 MiB
    mesh = jax.make_mesh((count,), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("all"))
    part = sharding.shard_shape((count, size))
    numbered = jax.make_array_from_callback(
        (count, size), sharding, lambda index: np.full(part, index[0].start or 0, np.float32)
    )
    psum = jax.shard_map(
        lambda x: jax.lax.psum(x[0], "all"), mesh=mesh, in_specs=PartitionSpec("all"), out_specs=PartitionSpec()
    )
    reduce = jax.jit(psum)
    yield "ready"  # before the first collective, in which they would wait for one that fails here
    if not (np.asarray(reduce(numbered).addressable_data(0)) == count * (count - 1) / 2).all():
        return Finding("failed", "a wrong sum: look at the driver and at the network")
    gigabytes = 2 * (count - 1) / count * 4 * size / 1e9
    speed = min((yield gigabytes / median_seconds(lambda: reduce(numbered))))
    text = f"{speed:.3g} GB/s over {count} devices, {4 * size // 2**20} MiB each"
    if speed < 1 and jax.default_backend() == "gpu":
        return Finding("warning", f"{text}: slow; NCCL_DEBUG=INFO says which network NCCL found")
    return Finding("ok", text)


def median_seconds(call: Callable, repeats: int = 5) -> float:
    """Seconds that a call takes, the median after one that compiles."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ----------------------------------------------------------------------------------------- disk, clocks, compilation


def check_directory(directory: str) -> Steps:
    """Every process can write there, and sees what the others wrote: they all write one checkpoint."""
    place = Path(directory)
    names = yield f".doctor-{os.urandom(4).hex()}"
    own = place / f"{names[0]}-{distributed.process_index()}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        own.write_text("probe")
    except OSError as error:
        return Finding("failed", f"{place}: {error.strerror}; legal: --directory DIR that can be written")
    try:
        yield "written"
        seen = [(place / f"{names[0]}-{process}").is_file() for process in range(len(names))]
        yield "seen"
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
    if not all(seen):
        return Finding(
            "failed",
            f"{place.resolve()}: what process {seen.index(False)} writes is not there; legal: a directory on a file "
            "system that all hosts share",
        )
    free = min((yield shutil.disk_usage(place).free / GIB))
    text = f"{place.resolve()} can be written, {free:.0f} GiB free"
    return Finding("warning" if free < 1 else "ok", text)


def check_clocks() -> Steps:
    """How far this process's clock is from that of process 0. Seen through a barrier, so only to some milliseconds."""
    if distributed.process_count() == 1:
        return Finding("ok", "one process")
    own = []
    for _ in range(5):
        yield "now"
        own.append(time.time())
    rounds = np.asarray((yield own))
    skew = float(np.abs(np.median(rounds - rounds[0], axis=1)).max())
    text = f"at most {skew:.2f} seconds apart"
    if skew > 1:
        return Finding("warning", f"{text}: log lines of hosts cannot be compared; run a time service (chrony)")
    return Finding("ok", text)


def check_cache() -> Steps:
    """A program compiled once is read from the cache the second time, on every process."""
    directory = jax.config.jax_compilation_cache_dir
    if not directory:
        return Finding("warning", "off: every start compiles everything; RLJAX_CACHE=DIR switches it on")
    if distributed.is_main():  # the others only read
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            return Finding("warning", f"{directory}: {error.strerror}; RLJAX_CACHE=DIR takes another place")
    yield "can be written"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    first, _ = compile_probe()
    yield "compiled"  # process 0 has written it
    second, is_hit = compile_probe()
    first, second = (yield first, second)[0]
    text = f"{directory}: compiled in {first:.2f} seconds, read back in {second:.2f}"
    keeps_own = distributed.is_main() or jax.default_backend() != "cpu"  # on CPUs JAX keeps programs of process 0 alone
    if keeps_own and not is_hit:
        return Finding("warning", f"{directory}: not read back; RLJAX_CACHE=DIR on a file system that all hosts share")
    return Finding("ok", text)


def compile_probe() -> tuple[float, bool]:
    """Seconds that a small program of all devices takes to compile, and whether it came from the cache."""
    mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = NamedSharding(mesh, PartitionSpec())
    events: list[str] = []
    listen = lambda event, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listen)
    start = time.perf_counter()
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=everywhere)
    jax.jit(lambda x: jnp.linalg.norm(jnp.tanh(x @ x)), out_shardings=everywhere).lower(x).compile()
    seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_listener(listen)
    return seconds, "/jax/compilation_cache/cache_hits" in events
