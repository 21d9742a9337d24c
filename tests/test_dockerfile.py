"""The Dockerfile's steps on the files that are here; the build itself needs a Docker daemon."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from fnmatch import fnmatch

import pytest
from conftest import ROOT

TEXT = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
TEXT = TEXT.replace("\\\n", " ")
IGNORED = (ROOT / ".dockerignore").read_text().split()


def steps(word: str) -> list[str]:
    return [line.split(" ", 1)[1] for line in TEXT.splitlines() if line.startswith(f"{word} ")]


def test_every_file_that_is_copied_is_here_and_not_ignored():
    let_in = [pattern[1:] for pattern in IGNORED if pattern.startswith("!")]
    assert IGNORED[0] == "*"
    names = [name for line in steps("COPY") for name in line.split()[:-1]]
    assert {"liteguard", "configs", "constraints.txt"} <= {*names}
    for name in names:
        assert [*ROOT.glob(name)], name
        assert any(fnmatch(name, pattern) or name == pattern for pattern in let_in), name


@pytest.mark.parametrize(
    ("sets", "index"), [("train bundle convert", ""), ("train", "file:///torch-builds")]
)
def test_the_steps_install_the_sets_and_the_build_of_torch_first(tmp_path, sets, index):
    """The install step, run by sh with a pip that writes down what it is asked for."""
    for file in ROOT.glob("requirements*.txt"):
        shutil.copy(file, tmp_path)
    pip = tmp_path / ".venv/bin/pip"
    pip.parent.mkdir(parents=True)
    # The first attempt with constraints fails, as it does when a nightly is gone.
    pip.write_text('#!/bin/sh\necho "$@" >> asked\ncase "$*" in *constraints*) exit 1;; esac\n')
    pip.chmod(0o755)
    (install,) = [step for step in steps("RUN") if "pip install" in step]
    install = install.replace("python -m venv .venv", "true")
    environment = {"SETS": sets, "TORCH_INDEX": index, "PATH": "/usr/bin:/bin"}
    subprocess.run(["sh", "-ec", install], cwd=tmp_path, env=environment, check=True)
    asked = (tmp_path / "asked").read_text().splitlines()
    files = " ".join(f"-r requirements-{name}.txt" for name in sets.split())
    wanted = [f"install --no-cache-dir {files} -c constraints.txt"]
    wanted.append(f"install --no-cache-dir {files}")
    if index:
        wanted.insert(0, f"install --no-cache-dir --index-url {index} torch==2.13.0")
    assert asked == wanted
    for name in sets.split():
        assert (ROOT / f"requirements-{name}.txt").is_file()


@pytest.mark.parametrize(
    ("sets", "asked"),
    [("train bundle convert", "doctor.py"), ("train", "doctor.py --only train")],
)
def test_the_doctor_looks_at_what_was_installed(tmp_path, sets, asked):
    """An image for training has no converter, and its first command must not fail for that."""
    (python := tmp_path / "python").write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    command = json.loads(steps("CMD")[-1])
    environment = {"SETS": sets, "PATH": f"{tmp_path}:/usr/bin:/bin"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == asked
