"""Commands of the documents that tests/test_readme.py does not run: they are read, at least.

That file runs what stands in ```bash. ```sh is for what takes hours, a phone, a cloud or Docker.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

from liteguard.config import valid_names

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
FENCES = re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```$", TEXT, re.DOTALL | re.MULTILINE)
SCRIPTS = {path.name for path in ROOT.glob("*.py")}


def commands(block: str) -> list[str]:
    """Each command of a shell's block, the body of a loop as well."""
    lines = block.replace("\\\n", " ").splitlines()
    steps = [step.strip() for line in lines for step in line.split("  #")[0].split(" && ")]
    return [step for step in steps if step and not re.match(r"for |done$", step)]


SHELL = [command for kind, block in FENCES if kind in ("bash", "sh") for command in commands(block)]
# "docker run ... liteguard python train_domain.py ..." as well.
OURS = [found[0] for command in SHELL if (found := re.search(r"\bpython \w+\.py.*", command))]


def test_commands_stand_in_fences_that_are_looked_at():
    kinds = {kind for kind, _ in FENCES}
    assert {"bash", "sh"} < kinds <= {"bash", "sh", "text", "yaml", "kotlin", "dart"}
    others = [line for kind, block in FENCES if kind == "text" for line in block.splitlines()]
    assert not [line for line in others if line.startswith(("python ", "pip ", "$ "))]


@pytest.mark.parametrize("command", dict.fromkeys(OURS))
def test_a_scripts_flags_and_settings_exist(command, monkeypatch, capsys):
    script, *words = shlex.split(command)[1:]
    assert script in SCRIPTS
    monkeypatch.setattr(sys, "argv", [script, *words])
    try:
        args = importlib.import_module(script.removesuffix(".py")).parse_args()
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    for setting in getattr(args, "settings", []):
        name = re.sub(r"^(data\.\w+)\.\d+\..*", r"\1", setting.partition("=")[0])
        assert name in valid_names(), setting


def flags_of(file: str) -> tuple[set[str], set[str]]:
    """(all flags, the required ones) that a file gives its parser; to run it takes seconds."""
    known, required = {"--help"}, set()
    for call in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        names = [a.value for a in call.args if isinstance(a, ast.Constant)]
        if call.func.attr == "add_argument" and names and names[0].startswith("--"):
            known |= {*names, *(f"--no-{name[2:]}" for name in names)}
            if any(key.arg == "required" for key in call.keywords):
                required |= {*names}
    return known, required


MEASURING = re.findall(r"\bpython (benchmarks/\w+\.py[^`\n]*)", TEXT.replace("\\\n", " "))


@pytest.mark.parametrize("command", dict.fromkeys(MEASURING))
def test_the_flags_of_a_measurement_exist(command):
    file, *words = shlex.split(command.split("  #")[0])
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    known, required = flags_of(file)
    assert required <= given <= known
