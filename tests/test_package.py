"""What an installed package holds: every file of the folder, the version and the pins."""

from __future__ import annotations

import tomllib
from fnmatch import fnmatch

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import liteguard
from liteguard.evaluation import metrics, refusals

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGE = ROOT / "liteguard"


def test_files_that_are_no_code_are_named():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file()]
    others = [path for path in files if path.suffix not in (".py", ".pyc")]
    assert len(others) >= 5  # the catalogue, two templates, py.typed
    for path in others:
        assert any(fnmatch(path.name, pattern) for pattern in patterns), path


def test_every_folder_with_code_is_a_package():
    """setuptools finds packages by their __init__.py."""
    for path in PACKAGE.rglob("*.py"):
        assert (path.parent / "__init__.py").is_file(), path


def test_the_pins_are_the_requirements():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "liteguard.__version__"}
    assert set(PROJECT["project"]["dynamic"]) == {"version", "optional-dependencies"}
    extras = {name: extra["file"] for name, extra in dynamic["optional-dependencies"].items()}
    assert set(extras) == {"train", "convert", "trackers", "demo"}
    # setuptools reads no -r lines, so that demo names the files of requirements.txt.
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert extras["demo"] == [line[3:] for line in lines if line.startswith("-r ")]
    assert {*extras["train"], *extras["convert"]} == {*extras["demo"]}
    for file in {file for files in extras.values() for file in files}:
        lines = (ROOT / file).read_text().splitlines()
        assert all(Requirement(line) for line in lines if line and not line.startswith("#"))
    train = (ROOT / "requirements-train.txt").read_text().splitlines()
    assert {*PROJECT["project"]["dependencies"]} <= {*train}


def test_licence_files_are_there():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    for name in PROJECT["project"]["license-files"]:
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_modules_keep_their_old_names_for_a_release():
    for name, folder in liteguard._MOVED.items():
        with pytest.warns(DeprecationWarning, match=f"liteguard.{folder}.{name} now"):
            found = getattr(liteguard, name)
        assert found.__name__ == f"liteguard.{folder}.{name}"
    assert metrics.judge is refusals.judge
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = liteguard.nothing
