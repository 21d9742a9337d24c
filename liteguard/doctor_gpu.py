"""The GPU, its driver and the build of torch: do they fit, and what is said where they do not.

A torch of a newer CUDA than the driver knows finds no GPU and says so in a warning only: training
then runs on the CPU, hundreds of times slower. Nothing here imports torch, so that it can be asked
before anything is installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER_FILE = Path("/proc/driver/nvidia/version")
PCI = Path("/sys/bus/pci/devices")
# The first Linux driver of each major version of CUDA, from NVIDIA's table of compatibility. Within
# a major version a driver runs builds of all minor ones.
FIRST_DRIVER = {11: 450, 12: 525, 13: 580}
# Compute capability from which a GPU multiplies bfloat16 (Ampere).
BFLOAT16 = (8, 0)

_KIND = re.compile(r"(?P<what>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")

_PROBE = """
import json, warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import torch
    available = torch.cuda.is_available()
    devices = []
    for number in range(torch.cuda.device_count() if available else 0):
        of = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        devices.append({"name": of.name, "capability": [of.major, of.minor],
                        "free": free, "total": total})
    onednn = torch.backends.mkldnn.is_available()
    units = bool(onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda,
                  "hip": torch.version.hip, "available": available, "devices": devices,
                  "built_for": torch.cuda.get_arch_list() if available else [],
                  "cpu_bfloat16": units, "said": [str(s.message)[:300] for s in said]}))
"""


@dataclass(frozen=True)
class Driver:
    """What NVIDIA's driver is: the newest CUDA that it knows, and its own version."""

    cuda: tuple[int, int]
    version: str = ""

    def __str__(self) -> str:
        known = f"CUDA {self.cuda[0]}.{self.cuda[1]}"
        return f"driver {self.version} ({known})" if self.version else f"a driver of {known}"


def find_driver() -> Driver | None:
    """The installed driver; None where there is none (or no library of it that can be opened)."""
    for name in ("libcuda.so.1", "libcuda.so"):
        with contextlib.suppress(OSError, AttributeError):
            library, number = ctypes.CDLL(name), ctypes.c_int(0)
            if library.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
                cuda = (number.value // 1000, number.value % 1000 // 10)
                return Driver(cuda, _driver_version())
    return None


def _driver_version() -> str:
    with contextlib.suppress(OSError):
        words = DRIVER_FILE.read_text(encoding="utf-8", errors="replace").split()
        return next((w for w in words if w.count(".") >= 1 and w[0].isdigit()), "")
    return ""


def card_is_there() -> bool:
    """Whether the machine has a card of NVIDIA's that computes, driver or not."""
    for device in PCI.glob("*") if PCI.is_dir() else ():
        with contextlib.suppress(OSError):
            vendor = (device / "vendor").read_text(encoding="ascii").strip()
            kind = (device / "class").read_text(encoding="ascii").strip()
            # 0x0300 to 0x0302: display controllers, 3D controllers among them.
            if vendor == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def hidden_by_hand() -> bool:
    """Whether CUDA_VISIBLE_DEVICES asks for no GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")


def probe_torch(python: str = sys.executable, seconds: float = 300) -> dict[str, Any]:
    """What torch says of itself in a process of its own.

    version, cuda (of the build; None for a CPU build), hip, available, devices (name, capability,
    free and total bytes), built_for (kinds of GPU, as `sm_80`), cpu_bfloat16, said (its warnings);
    or only error, in a line.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            [python, "-c", _PROBE],
            capture_output=True,
            text=True,
            timeout=seconds,
            errors="replace",
            env=environment,
        )
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        lines = done.stderr.strip().splitlines()
        return {"error": lines[-1][:200] if lines else f"ended with {done.returncode}"}
    except subprocess.TimeoutExpired:
        return {"error": f"not imported after {seconds:.0f} s: is the machine busy?"}
    except (OSError, ValueError, IndexError) as error:
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def without_code(
    capability: Sequence[int], built_for: Sequence[str], cuda: str | None
) -> tuple[str, str] | None:
    """(that a build of torch has no code for a GPU, the remedy); None where it has, or may have.

    Code of `sm_XY` runs on GPUs of the same major number from that minor one on, with `a` behind it
    on that GPU alone; `compute_XY` is compiled for every later one, with `f` behind it for those of
    its major number (NVIDIA's rules).
    """
    own = capability[0], capability[1]
    kinds = [found for name in built_for if (found := _KIND.fullmatch(name))]
    for kind in kinds:
        of = int(kind["major"]), int(kind["minor"])
        later = of[0] == own[0] or (kind["what"] == "compute" and kind["only"] != "f")
        if of == own or (of < own and later and kind["only"] != "a"):
            return None
    if not kinds:  # ROCm names its GPUs otherwise
        return None
    name = f"sm_{own[0]}{own[1]}"
    newest = max((int(kind["major"]), int(kind["minor"])) for kind in kinds)
    which = "a newer" if own > newest else "an older"
    return (
        f"the installed torch (CUDA {cuda}) has no code for a GPU of kind {name} (it has "
        f"{', '.join(built_for)}): the first computation fails",
        f"install torch built for {which} CUDA, from PyTorch's index for it, or leave the card out "
        "with CUDA_VISIBLE_DEVICES",
    )


def why_unused(cuda: str | None, driver: Driver | None, said: str = "") -> tuple[str, str] | None:
    """(why torch does not use the GPU that is here, the remedy); None where there is none to use.

    `cuda`: of torch's build, None for a CPU build. To be asked where `torch.cuda.is_available()`
    is false.
    """
    if hidden_by_hand():
        return None
    if driver is None:
        if not card_is_there():
            return None
        return (
            "an NVIDIA card is here, but no driver of it",
            f"install NVIDIA's driver ({_first(cuda)}); in a container, start it with --gpus all",
        )
    if cuda is None:
        return (
            f"the installed torch is the CPU build, and {driver} is here: training runs on the CPU",
            f"install the same version of torch built for CUDA {driver.cuda[0]}, from PyTorch's "
            "index for it",
        )
    built = int(cuda.split(".")[0])
    if built > driver.cuda[0]:
        return (
            f"the installed torch is built for CUDA {cuda}, and {driver} is older: training runs "
            "on the CPU",
            f"update the driver ({_first(cuda)}), or install the same version of torch built for "
            f"CUDA {driver.cuda[0]}, from PyTorch's index for it",
        )
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return (
            f"CUDA_VISIBLE_DEVICES={named[:80]!r} names no card that torch (CUDA {cuda}) can use",
            "unset it, or name one that nvidia-smi -L lists",
        )
    return (
        f"torch (CUDA {cuda}) finds no GPU, though {driver} is here{': ' + said if said else ''}",
        "look at nvidia-smi; in a container, start it with --gpus all",
    )


def _first(cuda: str | None) -> str:
    number = FIRST_DRIVER.get(int(cuda.split(".")[0])) if cuda else None
    return f"version {number} or newer for CUDA {cuda}" if number else "its newest version"


def warning_of_unused() -> str | None:
    """One line for a script that is about to train without the GPU that is here, or on one that
    torch has no code for; else None."""
    import torch

    cuda = torch.version.cuda
    if torch.cuda.is_available():
        kinds = map(torch.cuda.get_device_capability, range(torch.cuda.device_count()))
        lacking = (without_code(kind, torch.cuda.get_arch_list(), cuda) for kind in kinds)
        found = next(filter(None, lacking), None)
    else:
        found = why_unused(cuda, find_driver())
    if found is None:
        return None
    return f"warning: {found[0]}. To use it: {found[1]}. More: python doctor.py"
