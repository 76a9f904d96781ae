"""Facts of the machine that a run records: what it runs on, and how much memory it took."""

import os
import platform
import resource
import sys

import jax


def environment() -> dict[str, str | int]:
    """What the numbers of a run may depend on besides its settings and its code."""
    devices = jax.devices()
    return {
        "jax": jax.__version__,
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "backend": jax.default_backend(),
        "processes": jax.process_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count() or 0,
    }


def peak_bytes() -> dict[str, float]:
    """`peak_host_bytes`: the largest resident memory of this process so far. `peak_device_bytes`: of the fullest of its
    devices, where they tell (GPUs and TPUs do, CPUs do not).
    """
    unit = 1 if sys.platform == "darwin" else 1024
    peaks = {"peak_host_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_devices = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    if on_devices:
        peaks["peak_device_bytes"] = float(max(on_devices))
    return peaks
