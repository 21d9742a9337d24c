"""What can run on this machine and why not: one line for each thing, with its remedy.

Nothing but Python's own library is imported here: what is looked at may be missing or broken.
Everything is looked at in other processes, or through files of the system.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liteguard import doctor_gpu, doctor_hub, doctor_packages, limits, shown

State = Literal["ok", "note", "missing"]
# Oldest Python whose grammar the code uses, and the newest that all pins have builds for.
OLDEST, NEWEST = (3, 11), (3, 13)
# What the demo takes, and Phi-2 from data to a proven bundle (docs/memory.md), in GB.
DEMO_GB, PHI_GB = 4.5, 13.8
DEMO_DISK_GB, PHI_DISK_GB = 3.0, 36.5
INSTALL = {
    "train": "pip install -r requirements-train.txt -c constraints.txt",
    "bundle": "pip install -r requirements.txt -c constraints.txt",
    "convert": "pip install -r requirements.txt -c constraints.txt",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, what was found, and what to do about it.

    note: it works, but something is worth knowing. missing: a script will not run, or not as it
    should.
    """

    state: State
    what: str
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        tail = f" -> {self.remedy}" if self.remedy else ""
        return shown.message(f"{self.state:8} {self.what:26} {self.found}{tail}").replace("\n", " ")


def system() -> Iterator[Finding]:
    """The operating system and Python."""
    name, release = platform.system(), platform.release()
    if name == "Linux":
        wsl = ", in WSL" if "microsoft" in release.lower() else ""
        yield Finding("ok", "system", f"Linux {release} {platform.machine()}{wsl}")
    else:
        yield Finding(
            "note",
            "system",
            f"{name} {release}: the scripts know it, but have been tested on Linux only",
            "use Linux where something is missing below",
        )
    version = f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    if tuple(sys.version_info[:2]) < OLDEST:
        yield Finding("missing", "Python", version, "make an environment with Python 3.11 or newer")
    elif tuple(sys.version_info[:2]) > NEWEST:
        yield Finding(
            "note",
            "Python",
            f"{version}, newer than what the pins were tested with",
            "Python 3.11 to 3.13 where a package cannot be installed",
        )
    else:
        yield Finding("ok", "Python", f"{version} ({sys.executable})")


def torch_and_gpu() -> Iterator[Finding]:
    """The build of torch against the driver, bfloat16, and the memory of every GPU."""
    driver, torch = doctor_gpu.find_driver(), doctor_gpu.probe_torch()
    if error := torch.get("error"):
        yield Finding("missing", "torch", error, INSTALL["train"])
        if driver:
            yield Finding("ok", "GPU driver", str(driver))
        return
    cuda = torch["cuda"]
    build = f"CUDA {cuda}" if cuda else "ROCm" if torch["hip"] else "CPU"
    name = f"{torch['version']}, {build} build"
    if torch["available"]:
        yield Finding("ok", "torch and driver", f"{name}; {driver or 'its driver'}")
        yield from gpus(torch)
        return
    said = "; ".join(torch["said"])
    if unused := doctor_gpu.why_unused(cuda, driver, said):
        yield Finding("missing", "torch and driver", f"{name}: {unused[0]}", unused[1])
    elif doctor_gpu.hidden_by_hand() and driver:
        yield Finding(
            "note", "torch and driver", f"{name}; CUDA_VISIBLE_DEVICES hides the GPU", "unset it"
        )
    else:
        yield Finding("ok", "torch and driver", f"{name}; no GPU here: training on the CPU")
    if torch["cpu_bfloat16"]:
        yield Finding("ok", "bfloat16", "this CPU multiplies it")
    else:
        yield Finding(
            "note",
            "bfloat16",
            "this CPU does not multiply it: float32 is used, which is slower",
            "a CPU with AVX512-BF16 or AMX, or a GPU of the Ampere generation or newer",
        )


def gpus(torch: dict[str, Any]) -> Iterator[Finding]:
    """Memory and bfloat16 of every GPU that torch sees, and whether it can compute there."""
    for number, device in enumerate(torch["devices"]):
        free, total = device["free"] / 1e9, device["total"] / 1e9
        bfloat16 = tuple(device["capability"]) >= doctor_gpu.BFLOAT16
        has = "bfloat16" if bfloat16 else "no bfloat16"
        text = f"{device['name']}, {free:.1f} of {total:.1f} GB free, {has}"
        built_for = torch.get("built_for", [])
        if lacks := doctor_gpu.without_code(device["capability"], built_for, torch["cuda"]):
            yield Finding("missing", f"GPU {number}", f"{device['name']}: {lacks[0]}", lacks[1])
            continue
        remedy = ""
        if not bfloat16:
            remedy = "expect float32 for Phi and float16 for others; Ampere or newer is faster"
        elif free < 0.6 * total:
            remedy = "something else uses it: look at nvidia-smi"
        elif total < 7:
            remedy = "Phi-2 takes an 8 GB card; configs/phi-1_5.yaml with batch_size 1 takes less"
        yield Finding("note" if remedy else "ok", f"GPU {number}", text, remedy)
    if len(torch["devices"]) > 1:
        yield Finding(
            "note",
            "several GPUs",
            f"{len(torch['devices'])}; a script takes one",
            "CUDA_VISIBLE_DEVICES=0, or accelerate launch (docs/training.md)",
        )


def memory() -> Iterator[Finding]:
    """RAM, within the limits of control groups, and cores."""
    total, free = limits.total_memory(), limits.available_memory()
    yield Finding("ok", "cores", str(limits.cores()))
    if total is None:
        yield Finding("note", "memory", "this system does not say", "see docs/memory.md")
        return
    groups = limits.group_memory()
    within = f", within a control group's limit of {min(groups)[0] / 1e9:.1f} GB" if groups else ""
    free = total if free is None else free
    text = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free{within}"
    raise_it = "raise the container's limit" if groups else "close programs or add swap"
    if free < DEMO_GB * 1e9:
        yield Finding("missing", "memory", text, f"make demo takes {DEMO_GB} GB: {raise_it}")
    elif free < PHI_GB * 1e9:
        less = f"enough for make demo; Phi-2 takes {PHI_GB} GB: {raise_it}, or Phi-1.5 (9 GB)"
        yield Finding("note", "memory", text, less)
    else:
        yield Finding("ok", "memory", text)


def disk(folder: Path, cache: Path) -> Iterator[Finding]:
    """Free space where outputs go, and whether the cache can be written."""
    free = shutil.disk_usage(folder).free / 1e9
    text = f"{free:.1f} GB free in {folder.absolute()}"
    if free < DEMO_DISK_GB:
        remedy = f"make demo takes {DEMO_DISK_GB:.0f} GB: free some, or run it elsewhere"
        yield Finding("missing", "disk", text, remedy)
    elif free < PHI_DISK_GB:
        remedy = f"enough for make demo; Phi-2 takes {PHI_DISK_GB} GB from data to bundle"
        yield Finding("note", "disk", text, remedy)
    else:
        yield Finding("ok", "disk", text)
    place = cache if cache.exists() else folder
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        remedy = "give the right to write there, or --set data.cache_dir=DIR"
        yield Finding("missing", str(cache), f"cannot be written ({error.strerror})", remedy)
        return
    if not cache.exists():
        yield Finding("ok", str(cache), "not there yet; it is made when something is downloaded")
        return
    files = [path for path in cache.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e9
    wheels = sum(path.suffix == ".whl" for path in files)
    text = f"{size:.1f} GB in {len(files)} files, {wheels} packages with data among them"
    yield Finding("ok", str(cache), text)


def packages(
    name: str, python: str = sys.executable, known: Collection[str] = ()
) -> Iterator[Finding]:
    """Every package of a set but the `known`: there, of the tested version, and importable."""
    remedy = INSTALL[name]
    if python != sys.executable:
        remedy = f"{python} -m {remedy}".replace("requirements.txt", doctor_packages.FILES[name])
    for package in doctor_packages.check(name, python, known):
        what = f"import {package.name}"
        if package.installed is None:
            yield Finding("missing", what, "not installed", remedy)
        elif package.error:
            yield Finding("missing", what, f"{package.installed}: {package.error}", remedy)
        elif not doctor_packages.is_wanted(package.installed, package.wanted):
            tested = f"tested is {package.wanted.removeprefix('==')}"
            yield Finding("note", what, f"{package.installed} works; {tested}", remedy)
        else:
            yield Finding("ok", what, package.installed)


def converter(python: str = sys.executable) -> Iterator[Finding]:
    """The functions that the conversion calls; converter v2's may be missing (v1 is used then)."""
    place = "" if python == sys.executable else f" in {python}"
    for name, error in doctor_packages.try_all(doctor_packages.ENTRY_POINTS, python).items():
        if error is None:
            yield Finding("ok", f"converter: {name}", f"there{place}")
        elif name == "converter v2":
            text = f"not there{place} ({error}): v1 is used, with three times the memory"
            yield Finding("note", f"converter: {name}", text, "install the pinned tf-nightly")
        else:
            yield Finding("missing", f"converter: {name}", f"{error}{place}", INSTALL["convert"])


def hub(offline: bool, seconds: float) -> Iterator[Finding]:
    """Whether the model hub answers, and whether it takes the token; offline is no failure."""
    for state, what, found, remedy in doctor_hub.look(offline, seconds):
        yield Finding(state, what, found, remedy)


def examine(
    only: str = "all",
    python: str | None = None,
    cache: Path = Path(".cache"),
    offline: bool = False,
    seconds: float = 3.0,
) -> Iterator[Finding]:
    """Everything, or what `only` needs (train: no bundle and no converter).

    python: of the environment that `compress.python` names; default: this one.
    """
    yield from system()
    yield from torch_and_gpu()
    yield from memory()
    yield from disk(Path(), cache)
    yield from hub(offline, seconds)
    yield from packages("train")
    if only == "train":
        return
    yield from packages("bundle")
    here = python or sys.executable
    known = {*doctor_packages.requirements("train"), *doctor_packages.requirements("bundle")}
    yield from packages("convert", here, known if here == sys.executable else set())
    yield from converter(here)


def verdict(findings: list[Finding]) -> str:
    """The last line: what can run, and how many things are missing."""
    missing = [each for each in findings if each.state == "missing"]
    notes = sum(each.state == "note" for each in findings)
    if not missing:
        return f"all that is needed can run; {notes} notes"
    names = ", ".join(each.what.removeprefix("import ") for each in missing[:6])
    more = f" and {len(missing) - 6} more" if len(missing) > 6 else ""
    return f"missing: {names}{more}. Each line above says what to do."


def as_environment() -> None:
    """Keep libraries that are tried quiet, as `machine.quiet_libraries` does for the scripts."""
    for name in ("TF_CPP_MIN_LOG_LEVEL", "GLOG_minloglevel"):
        os.environ.setdefault(name, "3")
