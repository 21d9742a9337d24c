"""What is said while a step works, and when it has ended."""

from __future__ import annotations

import re
import time
from argparse import Namespace

import pytest
from conftest import ROOT, run_script

from liteguard import cli, progress, shown
from liteguard.config import SourceSection
from liteguard.data import files, lengths
from liteguard.evaluation import comparison
from liteguard.export import verify
from liteguard.progress import Progress, ticking, waiting
from liteguard.records import StageRecord
from liteguard.training.stage import closing


@pytest.fixture
def every_six_seconds(monkeypatch):
    """A clock that goes on by six seconds whenever somebody looks."""
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))


def test_progress_without_a_terminal(every_six_seconds, capsys):
    counted = Progress("answers", 6)
    for _ in range(6):
        counted.add(30)
    # A line once 15 seconds have gone, and the last one, which says how long it took.
    assert capsys.readouterr().out.splitlines() == [
        "  answers 3/6, 5 tok/s, 18 s left",
        "  answers 6/6, 5 tok/s, 36 s",
    ]


def test_a_resumed_step_counts_its_own_time_only(every_six_seconds, capsys):
    counted = Progress("answers", 1004, done=1000)
    for _ in range(4):
        counted.add(30)
    assert capsys.readouterr().out.splitlines() == [
        "  answers 1,003/1,004, 5 tok/s, 6 s left",
        "  answers 1,004/1,004, 5 tok/s, 24 s",
    ]


def test_rows_of_which_nobody_knows_how_many_there_are(every_six_seconds, capsys):
    for total, said in ((None, ""), (9000, " of about 9,000"), (5000, "")):
        counted = Progress("texts", total, unit="rows", about=True, quiet=True)
        for _ in range(4):
            counted.add(count=2000)
        left = ", 9 s left" if said else ""
        assert capsys.readouterr().out == f"  texts 6,000{said} rows, 333 rows/s{left}\n"
    layers = Progress("calibrating", 4, unit="layers")
    layers.add(count=3)
    layers.add()
    assert capsys.readouterr().out == "  calibrating 4/4 layers, 3.0 s each, 12 s\n"


def test_what_cannot_be_counted_says_that_it_is_at_work(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY_S", 0.02)
    with ticking("export", 100.0):
        time.sleep(0.2)
    lines = capsys.readouterr().out.splitlines()
    form = r"  export: [\d.]+ s so far, about (99|100) s left"
    assert lines and all(re.fullmatch(form, line) for line in lines), lines
    with pytest.raises(ZeroDivisionError), ticking("export"):
        1 / 0  # noqa: B018
    time.sleep(0.05)
    assert not capsys.readouterr().out, "it went on after the step had ended"
    assert waiting("export", 45, None) == "export: 45 s so far"
    assert waiting("export", 300, 200) == (
        "export: 5 min so far, longer than the 3 min it took on two cores"
    )


def test_rows_are_estimated_from_the_beginning_of_a_file(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        f'{{"prompt": "What is {n}?", "completion": "{"x" * (n % 90)}"}}' for n in range(40_000)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows) + "\n")
    table = pyarrow.table({"prompt": ["a"] * 500})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    source = SourceSection(dataset="prompt_completion", path=str(tmp_path))
    assert files.expected_rows(source) == pytest.approx(40_500, rel=0.03)
    few = source.model_copy(update={"limit": 100})
    assert files.expected_rows(few) == 100
    (tmp_path / "c.txt").write_text("paragraphs\n\nof any length\n")
    assert files.expected_rows(source) is None
    assert files.expected_rows(SourceSection(dataset="x", hub="a/b")) is None


def test_sizes_are_those_that_people_say():
    found = [shown.size(count) for count in (41_000, 1_400_000, 139e6, 2_780_000_000)]
    assert found == ["41 KB", "1.4 MB", "139 MB", "2.8 GB"]


def test_closing_lines_say_how_good_and_how_large(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 1_300_000)
    bases = {"shipped_perplexity": None, "trained_perplexity": 12.34}
    record = StageRecord.model_construct(
        metrics={"both_bases": bases}, lora={"r": 8, "use_rslora": False}, wall_s=200.0
    )
    told = f"wrote {tmp_path}: adapter of rank 8 (1.3 MB), validation perplexity 12.3"
    assert closing(tmp_path, record, [{"eval_loss": 2.0}]) == f"{told}4; 3 min"
    bases["shipped_perplexity"] = 12.31
    # Of the checkpoint that is kept, not of the last one.
    history = [
        {"eval_loss": 0.5, "eval_rewards/accuracies": 0.9},
        {"eval_loss": 0.6, "eval_rewards/accuracies": 0.7},
    ]
    said = closing(tmp_path, record, history)
    assert said == f"{told}1, 90% of validation pairs told apart; 3 min"

    facts = {"quantize": {"recipe": "int8"}}
    assert verify.closing(facts) == "int8 weights, not proven (--verify none)"
    same = {"perplexity_change": 0.0123, "agree_16": 0.25, "agree": 0.9375}
    proof = {"bundle": same, "speed": {"decode_tok_s": 233.4}}
    assert verify.closing({**facts, "verify": proof}) == (
        "int8 weights, proven against the merged model: perplexity +1.2%, 94% of answers begin "
        "as well; 233 tok/s on this machine"
    )
    del same["agree"]  # as in the record of an older bundle
    assert "25% of answers begin as well" in verify.closing({**facts, "verify": proof})
    results = {"base": {"perplexity": 3.0}, "final": {"perplexity": 2.0, "refused_harmful": 0.861}}
    assert comparison.closing(results) == "Final: perplexity 2.00, harmful refused 86%"
    rows = {"train": {"rows": 1200}, "test": {"rows": 30}}
    parts = ("domain", "instruction", "preference")
    counts = {f"{part}/{split}.jsonl": n for part in parts for split, n in rows.items()}
    assert lengths.closing({"counts": counts}) == (
        "3,600 training rows (1,200 domain, 1,200 instruction, 1,200 preference), 90 held out for "
        "testing"
    )


HEARD = """
import argparse, sys, warnings
from liteguard import cli

def main():
    settings = ["data.cache_dir=" + sys.argv[1]]
    given = argparse.Namespace(config="configs/phi-2.yaml", settings=settings, dry_run=False)
    cli.resolve_config(given)
    for number in range(3):
        warnings.warn(f"no kernels {number % 2}")
    warnings.warn("division by zero", RuntimeWarning)

cli.run(main)
"""


def test_what_libraries_warn_of_is_in_a_log_and_not_on_the_screen(tmp_path):
    found = run_script("-c", HEARD, str(tmp_path))
    assert found.returncode == 0 and "kernels" not in found.stdout + found.stderr
    assert "RuntimeWarning: division by zero" in found.stderr, "what is wrong with numbers is shown"
    [log] = [path.read_text() for path in tmp_path.glob("logs/*.log")]
    assert [line.split(" (")[0] for line in log.splitlines()] == [
        "1 x UserWarning: no kernels 0",
        "1 x UserWarning: no kernels 1",
    ]


def test_a_dry_run_keeps_no_log(monkeypatch):
    monkeypatch.setattr(cli, "_logs", [])
    given = {"config": str(ROOT / "configs/phi-2.yaml"), "settings": []}
    cli.resolve_config(Namespace(**given, dry_run=True))
    assert not cli._logs
    cli.resolve_config(Namespace(**given, dry_run=False))
    assert len(cli._logs) == 1
