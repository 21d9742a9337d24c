"""docs/liteguard.ipynb: the commands of docs/getting-started.md as cells of a notebook.

    make readme

Rendered as the tables of the documents are (readme.py): never edited by hand. The notebook names
its model in one place, so `phi2` and `microsoft/phi-2` in the documents' commands become that.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "docs/getting-started.md"

INTRODUCTION = """\
# LiteGuard

Trains a small language model on medical texts, questions and safety pairs, makes a bundle for a
phone of it, and measures every step: the commands of [getting-started.md](getting-started.md), one
after the other. With a GPU (Colab: *Runtime*, *Change runtime type*) or without. The default,
SmolLM2-135M, needs no model hub and takes about 15 minutes on two CPU cores.

Run any cell again: what is finished is reused, what was interrupted goes on. What comes out is
**not medical advice**.

This file is written by `make readme`; edit docs/getting-started.md."""

PLACE = """\
import os
import subprocess
from pathlib import Path

MODEL = "smollm2"  # or phi1_5, phi2: a GPU and a model hub
REPOSITORY = "https://github.com/TSTS09/LiteGuard"

# In the clone that this notebook lies in, or in one that is made now.
clone = next((p for p in (Path(), Path("..")) if (p / "train_domain.py").exists()), None)
if clone is None:
    clone = Path("LiteGuard")
    if not clone.exists():
        subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, str(clone)], check=True)
os.chdir(clone)"""

REPORT = """\
from html import escape

from IPython.display import HTML

page = escape(Path("evaluation/report.html").read_text(encoding="utf-8"), quote=True)
HTML(f'<iframe srcdoc="{page}" width="100%" height="800"></iframe>')"""

TOKEN = """\
A private or gated model needs a token: `os.environ["HF_TOKEN"] = "..."` in a cell of its own. Take
it out before you share the notebook; in Colab, *Secrets* keeps it out of the file."""


def block(heading: str) -> list[str]:
    """The commands of the first bash block below a heading of docs/getting-started.md."""
    text = SOURCE.read_text(encoding="utf-8")
    found = re.search(
        rf"^#+ {re.escape(heading)}\n.*?```(?:bash|sh)\n(.*?)```", text, re.DOTALL | re.MULTILINE
    )
    assert found, f"{SOURCE} has no commands below {heading!r}"
    return [line.split("  #")[0].strip() for line in found[1].splitlines() if line.strip()]


def of_the_model(command: str) -> str:
    """A command of the documents for the model that the notebook names."""
    named = command.replace("--model microsoft/phi-2 --rank 32", "--model_type phi2")
    named = re.sub(r"--model_type \w+", "--model_type {MODEL}", named)
    return named.replace("liteguard_phi2.task", "liteguard_{MODEL}.task")


def cells() -> list[tuple[str, str]]:
    """(kind of a cell, its text), in order."""
    install = block("Install")[0].split("&& ")[-1].replace("pip install", "pip install -q")
    (doctor,), (plan,) = (
        block("What can run here, and what will it take?"),
        [c for c in SOURCE.read_text(encoding="utf-8").splitlines() if c.startswith("python plan")],
    )
    prepare, domain, instruction, safety, compress, measure, bundle = block("Phi-2")
    together = measure.replace("--checkpoint", "--base --checkpoint") + " --bundle "
    together += bundle.split("--bundle ")[1]
    question = 'echo "What is asthma?" | python chat.py liteguard_phi2.task'
    steps = [
        ("Install. Restart the session if it asks for it.", [install]),
        ("What can run on this machine, and what will it take?", [doctor, plan]),
        ("Data: cleaned, kept apart from the public exams, split by disease.", [prepare]),
        ("Stage 1 reads texts (QLoRA).", [domain]),
        ("Stage 2 learns to answer questions.", [instruction]),
        ("Stage 3 learns what to refuse and what not to (DPO).", [safety]),
        ("The bundle, proven to answer like its model.", [compress]),
        ("Measure base, final checkpoint and bundle on the same held-out rows.", [together]),
        (
            "Compare them: SHIP or DO NOT SHIP.",
            ["python evaluate_model.py --compare base final bundle"],
        ),
        ("Ask the bundle something.", [question]),
    ]
    found = [("markdown", INTRODUCTION), ("code", PLACE), ("markdown", TOKEN)]
    for title, commands in steps:
        found.append(("markdown", f"## {title}"))
        found.append(("code", "\n".join(f"!{of_the_model(command)}" for command in commands)))
        if "--compare" in commands[0]:
            found.append(("code", REPORT))
    return found


def notebook() -> str:
    """The file's text: a notebook of format 4.5, without results."""
    written: list[dict[str, Any]] = []
    for number, (kind, text) in enumerate(cells()):
        cell: dict[str, Any] = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
        lines = text.splitlines(keepends=True)
        written.append({**cell, "source": lines})
    python = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": written,
        "metadata": {"kernelspec": python, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
