"""What is kept between runs is made again when the rules that made it change."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT, code_digest

from liteguard import rehearsal
from liteguard.config import Config, SetSection, SourceSection
from liteguard.evaluation import comparison, refusals, results
from liteguard.export import possible
from liteguard.training import tokens

PACKAGE = ROOT / "liteguard"
FIXTURE = Path(__file__).parent / "fixtures/versions.json"
# Name -> (the version in its code, the files whose rules it stands for).
VERSIONS = {
    "judge": (
        refusals.JUDGE_VERSION,
        ["evaluation/refusals.py", "evaluation/metrics.py"],
    ),
    "rehearsal": (rehearsal.VERSION, ["rehearsal.py"]),
    "tokens": (tokens.TOKENS_VERSION, ["training/tokens.py", "prompts.py"]),
    "possible": (
        possible.VERSION,
        [f"export/{name}.py" for name in ("possible", "tokenizer", "sentencepiece_native")],
    ),
}


@pytest.mark.parametrize("name", VERSIONS)
def test_a_version_is_raised_with_the_code_that_it_stands_for(name):
    version, files = VERSIONS[name]
    now = {"version": version, "code": code_digest(PACKAGE / file for file in files)}
    assert json.loads(FIXTURE.read_text())[name] == now, (
        f"{', '.join(files)}: changed. When the same input may now give something else, raise the "
        f"version of {name!r}. Then write {json.dumps({name: now})} to {FIXTURE.name}."
    )


def inputs() -> dict:
    return results.inputs_of(Config(), {}, {}, None, "base", ([], []))


def test_a_result_of_other_rules_is_not_reused(tmp_path, monkeypatch):
    before = inputs()
    monkeypatch.setattr(results, "JUDGE_VERSION", refusals.JUDGE_VERSION + 1)
    file = tmp_path / "final.json"
    monkeypatch.setattr(results.records, "read_raw", lambda *_: (None, {"inputs": before}))
    assert results.reuse(file, before) and results.reuse(file, inputs()) is None


def test_a_result_with_outside_sets_knows_by_which_rules_their_rows_were_made(
    tmp_path, monkeypatch
):
    file = tmp_path / "own.jsonl"
    file.write_text(json.dumps({"prompt": "Why?", "completion": "- one\n- two"}))
    config = Config()
    config.evaluate.sets = [SetSection(name="own", path=str(file), kind="questions")]
    before = results.inputs_of(config, {}, {}, None, "base", ([], []))
    assert "set_rows" not in inputs()
    monkeypatch.setattr(results.shards, "ROWS_VERSION", before["set_rows"] + 1)
    assert results.inputs_of(config, {}, {}, None, "base", ([], [])) != before
    shared = {"answers": [], "n": {"perplexity": 0}}
    lengths = {"max_new_tokens": 1, "max_text_tokens": 1, "context_words": 1}
    one, other = (
        {**shared, "inputs": {"evaluate": lengths, "rows": {}, "set_rows": rows}} for rows in (7, 8)
    )
    assert comparison.what_was_asked(one) != comparison.what_was_asked(other)


def test_results_of_two_rules_are_not_compared():
    """A refusal of the one may be an answer of the other."""
    lengths = {"max_new_tokens": 1, "max_text_tokens": 1, "context_words": 1}
    shared = {"answers": [], "n": {"perplexity": 0}}
    one, other = (
        {**shared, "inputs": {"evaluate": lengths, "rows": {}, "judge": judge}} for judge in (1, 2)
    )
    assert comparison.what_was_asked(one) != comparison.what_was_asked(other)


def test_the_bases_answers_are_judged_again(monkeypatch):
    def file() -> Path:
        source = SourceSection(dataset="self_answers", path="questions.jsonl")
        return rehearsal._file(Config(), source, "base", ["Why?"])

    before = file()
    assert file() == before
    monkeypatch.setattr(rehearsal, "JUDGE_VERSION", refusals.JUDGE_VERSION + 1)
    assert file() != before
