"""The house: rooms, arrows that run down, and a leaf that can be taken away."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib

from conftest import ROOT, succeed

SETTINGS = """
model_type: own
model: {name: a/model}
data:
  min_characters: 1
  domain: [{dataset: plain_text, path: texts.txt, text_unit: line}]
  instruction: [{dataset: prompt_completion, path: questions.jsonl}]
  preference: [{dataset: preference, path: pairs.jsonl}]
"""


def test_no_file_is_a_warehouse_or_a_cupboard():
    lines = {
        path: len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "liteguard").rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {path: count for path, count in lines.items() if count > 500} == {}
    assert len([path for path, count in lines.items() if count < 50]) <= 3


def test_the_tour_is_as_long_as_it_says():
    """What a newcomer reads in an hour."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tour = text.split("## Read it in an hour")[1].split("Then by question")[0]
    said = int(re.search(r"About ([\d,]+) lines", tour)[1].replace(",", ""))
    files = re.findall(r"`([\w/]+\.py)`", tour)
    lines = sum(len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in files)
    assert len(files) > 10 and abs(lines - said) <= 100 and said <= 3000, lines


def test_what_embedded_data_may_import_is_what_their_contract_says():
    """It forbids by name: a new module is allowed until it stands there."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (leaf,) = (c for c in contracts["contracts"] if c["name"].startswith("Embedded data"))
    named = leaf["name"].split(": ")[1].removesuffix(" only").replace(" and ", ", ")
    allowed = {f"liteguard.{name}" for name in named.split(", ")}
    forbidden = set(leaf["forbidden_modules"])
    there = {
        f"liteguard.{path.stem}"
        for path in (ROOT / "liteguard").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert allowed | forbidden == there - {"liteguard.__init__", "liteguard.embedded"}
    assert not allowed & forbidden


def test_without_the_embedded_folder_files_and_the_hub_still_work(tmp_path):
    """The folder and the lines of the registry that name it are all that has to go."""
    for name in ("liteguard", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "prepare_datasets.py", tmp_path)
    shutil.rmtree(tmp_path / "liteguard/embedded")
    registry = tmp_path / "liteguard/registry.py"
    text = registry.read_text()
    tie = re.search(r"# All that ties embedded/.*?# \(end of embedded/\)\n", text, re.DOTALL)
    assert tie is not None
    registry.write_text(text.replace(tie.group(), ""))
    for file in {*(tmp_path / "liteguard").rglob("*.py")} - {tmp_path / "liteguard/demo.py"}:
        assert "liteguard.embedded" not in file.read_text(), file
    kinds = ("liver", "kidney", "heart", "lung", "spleen", "brain", "skin", "eye", "ear", "tongue")
    words = [f"{kind} number {n}" for kind in kinds for n in range(30)]
    (tmp_path / "texts.txt").write_text(
        "".join(f"The {w} is described here, in a sentence of its own.\n" for w in words)
    )
    (tmp_path / "questions.jsonl").write_text(
        "".join(f'{{"prompt": "What is the {w}?", "completion": "It is {w}."}}\n' for w in words)
    )
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            f'{{"prompt": "Tell me of {w}.", "chosen": "It is {w}.", "rejected": "No {w}."}}\n'
            for w in words
        )
    )
    (tmp_path / "own.yaml").write_text(SETTINGS)
    printed = succeed(tmp_path / "prepare_datasets.py", "--config", "own.yaml", cwd=tmp_path)
    assert "next: python train_domain.py" in printed
    assert (tmp_path / "data/own/preference/train.jsonl").is_file()
    # The hub's side: every module is there, and a model of the hub is asked for at the hub.
    code = (
        "from liteguard import models, config as c\n"
        "from liteguard.data import preparation, datasets\n"
        "from liteguard.evaluation import held_out, knowledge, run\n"
        "from liteguard.training import stage\n"
        "own = c.build([('own', c.read_yaml(__import__('pathlib').Path('own.yaml')))])\n"
        "assert models.hub_model(own).name == 'a/model'\n"
        "assert 'alpaca' in datasets.DATASETS and 'mondo_text' not in datasets.DATASETS\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_fixtures_are_made_without_pytest(tmp_path):
    """Benchmarks and checks from outside build the tiny model with them: `fixture` has to do."""
    stub = (
        "def fixture(*given, **_):\n    return given[0] if given else lambda function: function\n"
    )
    (tmp_path / "pytest.py").write_text(stub, encoding="utf-8")
    made = "import conftest; print(conftest.tiny_data, conftest.tiny_config, conftest.tiny_phi)"
    result = subprocess.run(
        [sys.executable, "-c", made],
        env={"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests'}", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
