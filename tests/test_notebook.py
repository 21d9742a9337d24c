"""The notebook and the files for rented GPUs: every command is one that its script takes."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from conftest import ROOT

from benchmarks.readme import documents
from liteguard.config import available_configs

NOTEBOOK = ROOT / "docs/liteguard.ipynb"
EXAMPLES = sorted((ROOT / "docs/examples").glob("*.yaml")) + [
    ROOT / "docs/examples/phi2.dstack.yml"
]
STEPS = ["prepare_datasets", "train_domain", "train_instruction", "train_safety"]
STEPS += ["compress_model", "evaluate_model", "evaluate_model"]


def code_cells() -> list[str]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
    cells = content["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.keys() - {"execution_count", "outputs"} == {
            *("cell_type", "id", "metadata", "source")
        }
        assert not cell.get("outputs"), "results are not for the repository"
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def of_the_notebook() -> list[str]:
    found = [line for cell in code_cells() for line in cell.splitlines() if line.startswith("!")]
    return [line[1:].replace("{MODEL}", "smollm2") for line in found]


def of_an_example(path) -> list[str]:
    """Its commands, all of which are run in one shell."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "run" in content:
        return [*content["setup"].splitlines(), *content["run"].splitlines()]
    return content["commands"]


def take(command: str, monkeypatch) -> str:
    """The name of the script that a command runs, which takes all of its flags."""
    words = shlex.split(command.split("| ")[-1])
    script = ROOT / words[1].removeprefix("/workflow/")
    specification = importlib.util.spec_from_file_location(script.stem, script)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", [script.name, *words[2:]])
    args = vars(module.parse_args())
    assert args.get("model_type") in (None, *available_configs())
    return script.stem


def test_the_notebook_runs_the_six_scripts_in_order(monkeypatch):
    commands = of_the_notebook()
    scripts = [take(c, monkeypatch) for c in commands if "python " in c]
    assert [name for name in scripts if name in STEPS] == STEPS
    assert {*scripts} - {*STEPS} == {"doctor", "plan", "chat"}
    others = [c for c in commands if "python " not in c]
    assert others == ["pip install -q -r requirements.txt -c constraints.txt"]


def test_its_other_cells_are_python():
    cells = [cell for cell in code_cells() if not cell.startswith("!")]
    assert len(cells) == 2
    for cell in cells:
        ast.parse(cell)
    assert "train_domain.py" in cells[0] and "report.html" in cells[1]


def test_it_says_what_make_readme_would_write():
    assert NOTEBOOK.read_text(encoding="utf-8") == documents()[NOTEBOOK]


def cloned(folder: Path, config: Path) -> Path:
    """What a clone holds that the cells need, with the tiny model among the configurations."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("*.txt")):
        shutil.copy(file, folder)
    for name in ("liteguard", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(config, folder / "configs/tiny.yaml")
    (folder / "docs").mkdir()
    (folder / "bin").mkdir()
    # Installing is tested by whoever runs this: the cell's words are kept, its work is done.
    for name, does in (("python", f'{sys.executable} "$@"'), ("pip", 'echo "$@" > installed')):
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{does}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


def test_its_cells_run_from_the_first_to_the_last(tiny_config, tmp_path, monkeypatch):
    """In a clone, opened where it lies (docs/), on the tiny model: each cell as Jupyter runs it."""
    clone = cloned(tmp_path, tiny_config)
    monkeypatch.chdir(clone / "docs")
    monkeypatch.setenv("PATH", f"{clone / 'bin'}{os.pathsep}{os.environ['PATH']}")
    display = ModuleType("IPython.display")
    display.HTML = str
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    variables: dict = {}
    printed: dict[str, str] = {}
    for cell in code_cells():
        if not cell.startswith("!"):
            exec(cell.replace('MODEL = "smollm2"', 'MODEL = "tiny"'), variables)
            continue
        for line in cell.splitlines():
            command = line[1:].format(**variables)
            if "doctor.py" in command:  # imports everything, one by one: tests/test_doctor.py
                continue
            done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=900)
            said = f"{command}\n{done.stdout}\n{done.stderr}"
            assert done.returncode == 0, said
            assert "Traceback" not in said, said
            printed[command.split("| ")[-1]] = done.stdout
    assert Path.cwd() == clone and variables["MODEL"] == "tiny"
    assert (clone / "installed").read_text().split()[:2] == ["install", "-q"]
    for made in ("final_checkpoint/stage.json", "liteguard_tiny.task", "liteguard_tiny.litertlm"):
        assert (clone / made).is_file(), made
    assert "SHIP" in printed["python evaluate_model.py --compare base final bundle"]
    assert len(printed["python chat.py liteguard_tiny.task"].split()) > 3
    page = variables["page"]
    assert page.lower().startswith("&lt;!doctype html") and '"' not in page and len(page) > 10_000


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_a_rented_gpu_runs_the_six_scripts_in_order(path, monkeypatch):
    commands = of_an_example(path)
    scripts = [take(c, monkeypatch) for c in commands if c.startswith("python ")]
    assert scripts == ["doctor", *STEPS]
    others = [c for c in commands if not c.startswith("python ")]
    named = [word for c in others for word in c.split() if word.endswith(".txt")]
    assert named and all((ROOT / name).is_file() for name in named)
    assert "Not run by us" in path.read_text(encoding="utf-8")
