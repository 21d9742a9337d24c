"""The command that a script or a message says to run: whole, quoted, about the user's own data."""

from __future__ import annotations

import json
import re
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from conftest import ROOT

import prepare_datasets
import train_domain
from liteguard import checkpoints, cli
from liteguard.errors import UserError
from liteguard.rows import load_split, read_manifest


def words_of(text: str) -> list[str]:
    """The words of the command in a message, its script first."""
    (command,) = re.findall(r"python (\w+\.py .*)$", text, re.MULTILINE)
    return shlex.split(command)


def parsed(monkeypatch, script, words: list[str]) -> Namespace:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words])
    return script.parse_args()


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """README's mine.yaml, in the directory that the test runs in."""
    (text,) = re.findall(r"```yaml\n(extends.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text.replace("configs/", f"{ROOT}/configs/"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepared(directory: Path, **more: str) -> None:
    """Prepared data whose only row is damaged."""
    file = directory / "domain/train.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("{}\n")
    files = {"domain/train.jsonl": checkpoints.sha256_file(file)}
    manifest = {"model_type": "phi2", "files": files, **more}
    (directory / "manifest.json").write_text(json.dumps(manifest))


def check_is_mine(monkeypatch, error: UserError, output: str) -> Namespace:
    """The advice is accepted, and prepares the sources of mine.yaml where they were."""
    script, *words = words_of(str(error))
    args = parsed(monkeypatch, prepare_datasets, words)
    config = cli.resolve_config(args)
    assert script == "prepare_datasets.py" and args.output == output
    assert [source.path for source in config.data.domain] == ["textbooks/"]
    return args


@pytest.mark.parametrize("output", ["data/phi2", "my data/it's mine"])
def test_messages_about_data_name_the_sources_that_the_user_has(mine, monkeypatch, output):
    given = ["--config", "mine.yaml", "--set", "data.cache_dir=a cache"]
    args = parsed(monkeypatch, train_domain, given)
    with pytest.raises(UserError, match="No prepared data") as missing:
        read_manifest(Path(output), cli.config_flags(args))
    check_is_mine(monkeypatch, missing.value, output)
    made_by = shlex.join(cli.config_flags(parsed(monkeypatch, prepare_datasets, given)))
    prepared(Path(output), made_by=made_by)
    with pytest.raises(UserError, match="line 1") as damaged:
        load_split(Path(output), "domain", "train")
    found = check_is_mine(monkeypatch, damaged.value, output)
    assert found.overwrite and found.settings == ["data.cache_dir=a cache"]


@pytest.mark.parametrize("made_by", [{}, {"made_by": "--config 'open"}, {"made_by": "; rm -rf x"}])
def test_data_of_unknown_making_name_no_model(mine, made_by):
    """A directory's name may be that of a shipped model, and its sources the user's."""
    with pytest.raises(UserError) as missing:
        read_manifest(Path("data/phi2"))
    assert words_of(str(missing.value))[1:] == ["--config", "FILE", "--output", "data/phi2"]
    prepared(Path("data/phi2"), **made_by)
    with pytest.raises(UserError) as damaged:
        load_split(Path("data/phi2"), "domain", "train")
    words = words_of(str(damaged.value))
    assert words[1:3] == ["--config", "FILE"] and words[-1] == "--overwrite"
    assert words[-3:-1] == ["--output", "data/phi2"]
    assert "; rm" not in str(damaged.value).replace("';' rm", "")


def test_a_missing_first_stage_names_no_model_that_the_user_may_not_have():
    with pytest.raises(UserError) as error:
        checkpoints.read_stage(Path("nowhere"), "domain")
    assert "--model_type NAME, or --config FILE" in str(error.value)


# --- next: ----------------------------------------------------------------------------------------
def given(script: str, *words: str) -> Namespace:
    """The flags of a script, as `cli.parser` has them for all of them."""
    parser = cli.parser("")
    cli.add_model_flags(parser)
    parser.add_argument("--rank", type=int)
    return parser.parse_args([script, *words][1:])


def following(*words: str) -> list[str]:
    """What the step after one with these flags is given, beside its own."""
    line = cli.next_line("x.py", *cli.own_flags(given("train_domain.py", *words)))
    return shlex.split(line.removeprefix("next: python x.py"))


def test_a_step_is_given_again_what_its_parents_record_does_not_say():
    assert following("--model_type", "phi2", "--rank", "8", "--set", "domain.max_steps=4") == []
    for own in ("data.cache_dir=my cache", "compress.python=p", "model.trust_remote_code=true"):
        assert following("--model_type", "phi2", "--set", own) == ["--set", own]
    judge = ["--set", "evaluate.llm_judge.model=m"]
    assert following(*judge, "--set", "model.dtype=x", "--set", "data.cache=x") == judge


def test_a_yaml_is_given_again_with_what_was_laid_upon_it():
    """It stands in for the parent's record, which has those values, too."""
    words = ["--config", "my files/mine.yaml", "--set", "safety.beta=0.2"]
    assert following(*words) == words
    rank = ["--set", "domain.lora_rank=8"]
    assert following(*words, "--rank", "8") == [*words, *rank]


def test_stage_1_is_given_all_that_the_data_were_prepared_with():
    args = given("prepare_datasets.py", "--model_type", "phi2", "--set", "model_type=mine")
    line = cli.next_line("train_domain.py", *cli.config_flags(args))
    assert line == "next: python train_domain.py --model_type phi2 --set model_type=mine"
    again = given(*shlex.split(line.removeprefix("next: python ")))
    assert cli.resolve_config(again).model_type == "mine"
    args = given("prepare_datasets.py", "--model_type", "smollm2")
    line = cli.next_line("train_domain.py", *cli.config_flags(args))
    assert line == "next: python train_domain.py --model_type smollm2"


def test_no_script_writes_a_next_line_of_its_own():
    scripts = [path.read_text() for path in ROOT.glob("*.py")]
    assert not any("next: python" in text for text in scripts)
    assert sum(text.count("cli.next_line(") for text in scripts) == 7
