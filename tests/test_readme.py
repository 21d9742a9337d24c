"""Every command of the README is run or dry-run."""

from __future__ import annotations

import json
import os
import re
import shlex

import pytest
from conftest import CACHE, ROOT, fail, run_script

from liteguard.report import demo_markdown

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [line.split("  #")[0].strip() for b in BLOCKS for line in b.splitlines() if line.strip()]
SCRIPTS = [c for c in COMMANDS if c.startswith("python ")]


def test_every_command_is_of_a_known_kind():
    assert len(SCRIPTS) >= 10
    for command in set(COMMANDS) - set(SCRIPTS):
        assert command.startswith(("make demo", "make test", "python3 -m venv")), command


FINISHED = [c for c in SCRIPTS if "_checkpoint" in c or ".task" in c or "--compare" in c]


@pytest.mark.parametrize("command", [c for c in SCRIPTS if c not in FINISHED])
def test_commands_from_a_base_model(command, tmp_path, embedded):
    words = shlex.split(command.replace("configs/", f"{ROOT}/configs/"))[1:]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    extra = [] if "--dry_run" in words else ["--dry_run"]
    if "phi" in command:
        message = fail(2, ROOT / words[0], *words[1:], cwd=tmp_path, env=environment)
        assert (
            "Could not reach" in message
            or "not a model directory" in message
            or "does not exist" in message
        )
        return
    extra += ["--set", f"data.cache_dir={CACHE}"]
    if words[0] == "train_domain.py":
        extra += ["--data", embedded]
    result = run_script(ROOT / words[0], *words[1:], *extra, cwd=tmp_path, env=environment)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", dict.fromkeys(FINISHED))
def test_commands_on_finished_stages(command, pipeline):
    words = shlex.split(command.replace("liteguard_phi2.task", "liteguard_tiny.task"))[1:]
    result = run_script(ROOT / words[0], *words[1:], "--dry_run", cwd=pipeline)
    assert result.returncode == 0, result.stderr
    assert "dry run" in result.stdout


def test_the_demo_numbers_are_the_committed_reports():
    """The README's table is rendered from benchmarks/demo_report.json (make readme), not typed."""
    report = json.loads((ROOT / "benchmarks/demo_report.json").read_text())
    assert demo_markdown(report) in README
