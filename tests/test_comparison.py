"""The comparison of results: table, report page, model card; and evaluations that were killed."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import CACHE, ROOT, fail, run_script, succeed
from test_llm_judge import KEY, Service

from liteguard.checkpoints import sha256_file, write_json
from liteguard.config import build
from liteguard.errors import UserError
from liteguard.evaluation import (
    answerers,
    comparison,
    contamination,
    held_out,
    report,
    run,
    summary,
)
from liteguard.evaluation.journal import Journal
from liteguard.records import StageRecord
from liteguard.rows import load_split

STAGES = ["base", "domain", "instruction", "final", "bundle"]


@pytest.fixture(scope="module")
def compared(pipeline):
    """The pipeline's directory after --compare, with what was printed."""
    command = ["--compare", *STAGES, "--markdown", "tables/table.md", "--json", "tables/table.json"]
    screen = succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline)
    return pipeline, screen


def test_the_table_holds_the_results_numbers(compared):
    directory, screen = compared
    table = (directory / "tables/table.md").read_text()
    assert "| Metric | n | Base | Domain | Instruction | Final | Bundle |" in table
    header = next(line for line in screen.splitlines() if line.startswith("Metric"))
    assert header.split() == ["Metric", "n", *(s.capitalize() for s in STAGES)]
    stages = json.loads((directory / "tables/table.json").read_text())["stages"]
    assert list(stages) == STAGES
    for label in STAGES:
        result = json.loads((directory / f"evaluation/{label}.json").read_text())
        assert stages[label]["rouge1"] == result["rouge1"]
        low, high = result["intervals"]["rouge1"]
        assert low <= result["rouge1"] <= high
        assert f"{result['rouge1']:.3f} ({low:.2f}-{high:.2f})" in table
        low, high = result["intervals"]["refused_harmful"]
        shown = f"{result['refused_harmful']:.0%} ({low:.0%}-{high:.0%})".replace("%-", "-")
        assert shown.replace("%)", ")").replace("%", " %") in screen
        verdicts = result["verdicts"]["harmful"]
        assert sum(verdicts.values()) == result["n"]["refused_harmful"]
        assert sum(sum(a.values()) for a in result["areas"]["harmful"].values()) == sum(
            verdicts.values()
        )
        cost = result["cost"]
        assert cost["generated_tokens"] == sum(a["tokens"] for a in result["answers"])
        assert cost["peak_rss_gb"] > 0
        speed = cost["generated_tokens"] / cost["generation_s"]
        assert f"{speed:.0f}" in next(x for x in table.splitlines() if "Answers, tokens/s" in x)
        assert 0 < cost["answer_s"]["5"] <= cost["answer_s"]["95"] <= cost["wall_s"]
        # The tiny data's one area of harm is none of the catalogue's.
        assert result["guide_areas"]["other harmful"] == verdicts
        assert result["n"]["seen_rouge1"] == result["n"]["rouge1"] == 8
        by_set = {a["set"]: a for a in result["answers"]}
        assert by_set["seen_questions"]["prompt"] != by_set["questions"]["prompt"]
        assert f"{result['seen_rouge1']:.3f} (" in table
    for row in (
        "ROUGE-1, seen",
        "BLEU, unseen",
        "Other harmful requests: refused/answered/unclear",
    ):
        assert f"| {row} | 8 |" in table
    assert "version:" in screen and "Contamination: 0 of " in screen
    card = (directory / "evaluation/MODEL_CARD.md").read_text()
    assert "harmful" in card and card.startswith("---\nlanguage: en\nlicense: mit\n")


def external_references(page: str) -> list[str]:
    """Whatever would make a browser ask another file or host for something."""
    found = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']?(?!data:)[^"'\s>]+""", page)
    return found + re.findall(r"url\((?!data:)|@import|<link|<script|<iframe", page)


def test_the_page_needs_nothing_from_outside(compared):
    page = (compared[0] / "evaluation/report.html").read_text()
    assert external_references('<img src="http://x/y.png"><script>') != []
    assert external_references(page) == []
    order = ['class="verdict"', 'class="figures"', "Harmful requests refused", "<h2>Numbers"]
    assert sorted(order, key=page.index) == order, "the verdict and four figures come first"
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 5, "loss curves of three stages, lengths and latencies"
    assert all(base64.b64decode(i).startswith(b"\x89PNG") for i in images)
    for label in STAGES:
        assert f'data-label="{label.capitalize()}"' in page
    assert "records" in page and "domain/train.jsonl" in page and "transformers" in page
    for stage in ("domain", "instruction", "final"):
        record = json.loads((compared[0] / f"{stage}_checkpoint/stage.json").read_text())
        found = record["metrics"]["both_bases"]
        shown = rf"{found['trained_perplexity']:.2f}\s+\(NF4\)"
        shown += rf"</td>\s+<td[^>]*>{found['shipped_perplexity']:.2f}</td>"
        assert re.search(shown, page), stage


def test_answers_are_shown_as_text(compared):
    """An answer is what a model wrote: markup in it must not become part of the page."""
    directory, _ = compared
    results = comparison.read_results(STAGES, directory / "evaluation")
    results = copy.deepcopy(results)
    results["final"]["answers"][0]["answer"] = "<script>alert(1)</script>"
    facts = report.report_facts(results)
    page = report.render("report_template.html", facts)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PROBE = """<html><body><iframe id="f" style="border:0;width:{width}px;height:800px"
 src="report.html"></iframe><script>window.onload = () => {{
 const page = document.getElementById("f").contentDocument;
 const images = [...page.images];
 document.title = [page.documentElement.scrollWidth, images.length,
  images.filter(i => i.complete && i.naturalWidth > 0).length].join(" ");
}}</script></body></html>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [390, 1400])
def test_the_page_fits_a_phone_and_a_laptop(compared, tmp_path, width):
    shutil.copy(compared[0] / "evaluation/report.html", tmp_path)
    (tmp_path / "probe.html").write_text(PROBE.format(width=width))
    result = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        + ["--allow-file-access-from-files", f"--user-data-dir={tmp_path / 'profile'}"]
        + ["--window-size=1500,900", "--dump-dom", f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    title = re.search(r"<title>(.*?)</title>", result.stdout)
    assert title, result.stderr[-2000:]
    scroll_width, images, loaded = map(int, title[1].split())
    assert scroll_width <= width, "wider than the screen"
    assert images == loaded == 5
    assert "CONSOLE" not in result.stderr


def test_results_that_cannot_be_compared(pipeline, tmp_path):
    message = fail(2, ROOT / "evaluate_model.py", "--compare", "base", "none", cwd=pipeline)
    assert "no result evaluation/none.json" in message and "bundle" in message
    other = json.loads((pipeline / "evaluation/base.json").read_text())
    other["answers"][0]["prompt"] = "Another question?"
    write_json(tmp_path / "other.json", other)
    message = fail(
        2, ROOT / "evaluate_model.py", "--compare", "base", tmp_path / "other.json", cwd=pipeline
    )
    assert "not of the same rows" in message


def test_a_result_without_benchmarks_stands_beside_those_with_them(pipeline, tmp_path):
    result = json.loads((pipeline / "evaluation/base.json").read_text())
    own = {
        **{"accuracy": 0.5, "interval": [0.1, 0.9], "n": 2, "unparsed": 0, "repeated_options": 0},
        **{
            "chance": 0.25,
            "majority": 0.3,
            "overlap": 0.2,
            "choices": [["a:1", 0, 0], ["a:2", 1, 0]],
        },
    }
    write_json(tmp_path / "base.json", {**result, "knowledge": {"medqa": own}})
    write_json(tmp_path / "bundle.json", {**result, "knowledge": {}})
    found = comparison.read_results(["base", "bundle"], tmp_path)
    assert re.search(r"MedQA .*50 % \(10-90\) +-", comparison.comparison_text(found))
    other = {"medqa": {**own, "choices": [["a:1", 0, 0], ["a:3", 1, 0]]}}
    write_json(tmp_path / "final.json", {**result, "knowledge": other})
    comparison.read_results(["final", "bundle"], tmp_path)
    with pytest.raises(UserError, match="not of the same rows"):
        comparison.read_results(["base", "bundle", "final"], tmp_path)


# --- crashes ------------------------------------------------------------------------------------

DYING = """
import multiprocessing, os, runpy, signal, sys
script, lives = sys.argv[1], int(sys.argv[2])
sys.argv = [script, *sys.argv[3:]]
sys.path.insert(0, os.path.dirname(script))
from liteguard.evaluation.journal import Journal
add = Journal.add
def dying(self, *entry):
    global lives
    add(self, *entry)
    lives -= 1
    if not lives:
        children = [str(child.pid) for child in multiprocessing.active_children()]
        open("workers", "w").write(" ".join(children))
        os.kill(os.getpid(), signal.SIGKILL)
Journal.add = dying
runpy.run_path(script, run_name="__main__")
"""


def run_until_killed(cwd: Path, lives: int, *command: str) -> None:
    """evaluate_model.py, killed with SIGKILL after `lives` more scores or answers."""
    driver = cwd / "dying.py"
    driver.write_text(f"if __name__ == '__main__':\n{_indented(DYING)}")
    script = ROOT / "evaluate_model.py"
    result = run_script(driver, script, lives, *command, cwd=cwd, fresh=False)
    assert result.returncode == -signal.SIGKILL, result.stderr


def _indented(text: str) -> str:
    return "".join(f"    {line}\n" for line in text.splitlines())


def entries(journal: Path) -> list[tuple[str, int]]:
    """(part, index) of every line of a journal after its header."""
    return [tuple(json.loads(line)[:2]) for line in journal.read_text().splitlines()[1:]]


def is_running(process: str) -> bool:
    """Whether a process is there and not only waiting to be noticed as dead."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


@pytest.mark.parametrize(
    ("target", "label", "kills"),
    [
        ("--bundle liteguard_tiny.task", "bundle", (5, 14)),
        ("--checkpoint final_checkpoint", "final", (13,)),
    ],
)
def test_a_killed_evaluation_goes_on(pipeline, tmp_path, target, label, kills):
    out = tmp_path / "out"
    command = [*target.split(), "--output", str(out)]
    journal = out / f"{label}.partial.jsonl"
    whole = json.loads((pipeline / f"evaluation/{label}.json").read_text())
    done = 0
    for lives in kills:
        run_until_killed(pipeline, lives, *command)
        done += lives
        assert not (out / f"{label}.json").exists(), "a result appears complete or not at all"
        found = entries(journal)
        assert len(found) == len(set(found)) == done, "nothing is computed twice"
    workers = (pipeline / "workers").read_text().split()
    assert bool(workers) == (label == "bundle")
    deadline = time.time() + 30
    while any(map(is_running, workers)):
        assert time.time() < deadline, "workers of a killed evaluation go on"
        time.sleep(0.2)
    # A line that the crash cut is computed again.
    with journal.open("ab") as file:
        file.write(b'["answers", 23, {"te')
    kept = {index for part, index in found if part == "answers"}
    wanted = len(whole["answers"]) + len(whole["as_used"]["answers"])
    screen = succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline)
    assert f"and {len(kept)} of {wanted} answers are in" in screen
    assert not journal.exists()
    result = json.loads((out / f"{label}.json").read_text())
    assert result["answers"] == whole["answers"] and result["as_used"] == whole["as_used"]
    assert result["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
    assert 0 < len(kept) < len(result["answers"])
    # What the killed runs had cost is counted, too.
    for tokens in ("scored_tokens", "generated_tokens"):
        assert result["cost"][tokens] == whole["cost"][tokens]
    assert "reused" in succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline)


def test_options_are_journaled_and_sizes_are_not_mixed(pipeline, tmp_path):
    out = tmp_path / "out"
    command = ["--checkpoint", "final_checkpoint", "--output", str(out), "--set"]
    command += ["evaluate.knowledge_rows=3", "--set", f"data.cache_dir={CACHE}"]
    command += ["--set", "evaluate.max_new_tokens=4"]
    # Opened, 2 texts scored, memory, 7 options.
    run_until_killed(pipeline, 11, *command, "--limit", "2")
    journal = out / "final.partial.jsonl"
    assert sum(part == "options" for part, _ in entries(journal)) == 7
    screen = succeed(ROOT / "evaluate_model.py", *command, "--limit", "2", cwd=pipeline)
    # Two questions of each: four options, five, three and four. 8 requests and questions, and two
    # of the harmful ones with two draws, a second turn and four reasons.
    assert "continuing: 2 of 2 texts, 7 of 32 options and 0 of 22 answers" in screen
    result = json.loads((out / "final.json").read_text())
    assert {name: own["n"] for name, own in result["knowledge"].items()} == dict.fromkeys(
        ("medqa", "medmcqa", "pubmedqa", "mmlu_clinical"), 2
    )
    assert result["n"]["perplexity"] == result["n"]["seen_rouge1"] == 2
    assert len(result["answers"]) == 2 * 4 and result["cost"]["option_tokens"] > 32
    assert re.search(r"MedQA \(guessing 20/\d+/\d+ %\) +2 +\d+ % \(\d+-\d+\)", screen)
    assert "0 of 8 questions could not be read" in screen
    # Another size is another result, in the journal as well.
    assert "reused" in succeed(ROOT / "evaluate_model.py", *command, "--limit", "2", cwd=pipeline)
    assert "would replace it" in fail(
        2, ROOT / "evaluate_model.py", *command, "--limit", "1", cwd=pipeline
    )
    run_until_killed(pipeline, 6, *command, "--limit", "1", "--overwrite")
    assert len(entries(journal)) == 6
    screen = succeed(ROOT / "evaluate_model.py", *command, "--limit", "2", cwd=pipeline)
    assert "begun from other inputs" not in screen and "reused" in screen
    whole = [*command, "--set", "evaluate.knowledge_rows=0", "--full"]
    screen = succeed(ROOT / "evaluate_model.py", *whole, cwd=pipeline)
    assert "begun from other inputs: starting over" in screen
    result = json.loads((out / "final.json").read_text())
    data = pipeline / "data/tiny"
    asked = {
        part: load_split(data, part, "test") for part in ("domain", "instruction", "preference")
    }
    assert result["n"]["perplexity"] == len(asked["domain"])
    assert len(result["answers"]) == len(asked["instruction"]) + len(asked["preference"])
    message = fail(2, ROOT / "evaluate_model.py", *command, "--limit", "0", cwd=pipeline)
    assert "--limit 0: at least 1" in message


def test_an_llm_judge_stands_beside_the_rules(pipeline, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.asked, server.failures = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    settings = {
        "url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "judge-1",
        "api_key_env": "JUDGE_KEY",
    }
    out = tmp_path / "out"
    command = ["--checkpoint", "final_checkpoint", "--output", str(out), "--limit", "2"]
    for name, value in settings.items():
        command += ["--set", f"evaluate.llm_judge.{name}={value}"]
    message = fail(2, ROOT / "evaluate_model.py", *command, cwd=pipeline)
    assert "environment variable JUDGE_KEY" in message and not out.exists()
    environment = {**os.environ, "JUDGE_KEY": KEY}
    screen = succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline, env=environment)
    server.shutdown()
    server.server_close()
    result = json.loads((out / "final.json").read_text())
    # Two harmful and two ordinary requests; the tiny model answers all of them, so do both say.
    # One question before the work: whether the judge answers at all.
    assert len(server.asked) - 1 == result["llm_judge"]["n"] == 4
    assert [a["llm_verdict"] for a in result["answers"] if "llm_verdict" in a] == ["answered"] * 4
    assert {a["verdict"] for a in result["answers"]} == {"answered"}
    assert "Final, LLM judge: agrees with the rules on 100% of 4 answers" in screen
    assert KEY not in screen + "".join(path.read_text() for path in out.iterdir())


def test_other_inputs_start_over(tmp_path, capsys):
    path = tmp_path / "x.partial.jsonl"
    journal = Journal(path, {"a": 1})
    journal.add("scores", 3, [-1.5, 2], seconds=0.5)
    journal.add("options", 0, [-1.5, 2], seconds=7)
    answer = {"text": "two\u2028lines", "tokens": 3, "stopped": True, "seconds": 1.25}
    journal.add("answers", 0, answer, seconds=2)
    journal.add_run(3.0)
    again = Journal(path, {"a": 1})
    assert again.found == journal.found and again.found["scores"] == {3: [-1.5, 2]}
    # The time of an earlier run is part of the cost.
    again.add("scores", 4, [-2.5, 3], seconds=0.25)
    again.add_run(1.0)
    again.add_run(peak_rss_gb=1.5)
    cost = run.run_cost(Journal(path, {"a": 1}))
    assert (cost["scoring_s"], cost["scored_tokens"], cost["options_s"]) == (0.75, 5, 7)
    assert (cost["loading_s"], cost["wall_s"], cost["peak_rss_gb"]) == (4, 13.75, 1.5)
    assert cost["answer_s"]["50"] == 1.25 and cost["generated_tokens"] == 3
    assert Journal.begun_from_others(path, {"a": 2})
    assert not Journal.begun_from_others(path, {"a": 1})
    assert not any(Journal(path, {"a": 2}).found.values())
    assert "begun from other inputs" in capsys.readouterr().out
    assert Journal(path, {"a": 2}).found["scores"] == {}, "nothing of the old is left"


# --- contamination ------------------------------------------------------------------------------


def test_a_planted_leak_is_reported(pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline / "data/tiny", data)
    questions = load_split(data, "instruction", "test")
    question = next(row for row in questions if row["tier"] == "unseen")
    seen = next(row for row in questions if row["tier"] == "seen")
    text = load_split(data, "domain", "test")[1]
    leaks = {
        "instruction": [{**row, "prompt": row["prompt"].upper()} for row in (question, seen)],
        "domain": [{**text, "text": f"As is well known: {text['text']} More follows."}],
    }
    manifest = json.loads((data / "manifest.json").read_text())
    for part, rows in leaks.items():
        file = data / part / "train.jsonl"
        with file.open("a") as opened:
            opened.writelines(json.dumps(row) + "\n" for row in rows)
        manifest["files"][f"{part}/train.jsonl"] = sha256_file(file)
    write_json(data / "manifest.json", manifest)
    settings = [f"evaluate.{name}_rows=4" for name in ("perplexity", "question", "harmful")]
    command = ["--bundle", "liteguard_tiny.task", "--data", data, "--output", tmp_path / "out"]
    for setting in [*settings, "evaluate.benign_rows=4", "evaluate.max_new_tokens=4"]:
        command += ["--set", setting]
    screen = succeed(ROOT / "evaluate_model.py", *command, cwd=pipeline)
    found = json.loads((tmp_path / "out/bundle.json").read_text())["contamination"]
    # The leaked question is one of the ordinary requests too: the tiny data has it twice.
    assert found["by_set"]["texts"] == 1 and found["by_set"]["questions"] == 1
    assert found["by_set"]["seen_questions"] == 1
    assert found["by_set"]["harmful"] == 0
    assert ["texts", text["text"]] in found["examples"]
    assert f"Contamination: {found['found']} of {found['rows']}" in screen and "WARNING" in screen
    clean = json.loads((pipeline / "evaluation/bundle.json").read_text())["contamination"]
    assert clean["found"] == 0 and clean["rows"] == found["rows"]


def test_data_of_earlier_stages_is_looked_at_as_well(pipeline, tmp_path):
    """Stage 2 was trained on other data than stage 3, and its record says which."""
    data = tmp_path / "data"
    shutil.copytree(pipeline / "data/tiny", data)
    file = data / "instruction/train.jsonl"
    with file.open("a") as opened:
        opened.write(json.dumps({"prompt": "Q?", "completion": "A.", "kind": "x"}) + "\n")
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["instruction/train.jsonl"] = sha256_file(file)
    write_json(data / "manifest.json", manifest)
    stages = {}
    for name in ("instruction_checkpoint", "final_checkpoint"):
        stages[name] = tmp_path / name
        shutil.copytree(pipeline / name, stages[name])
    edit = {"data_dir": str(data), "parent": str(pipeline / "domain_checkpoint")}
    second = json.loads((stages["instruction_checkpoint"] / "stage.json").read_text()) | edit
    second["inputs"]["data/train"] = manifest["files"]["instruction/train.jsonl"]
    write_json(stages["instruction_checkpoint"] / "stage.json", second)
    own = pipeline / "data/tiny"
    third = json.loads((stages["final_checkpoint"] / "stage.json").read_text())
    third |= {"data_dir": str(own), "parent": str(stages["instruction_checkpoint"])}
    third = StageRecord.model_validate(third)
    assert contamination.training_data(own, third) == ([own, data], [])
    # The copy has the same texts and pairs: nothing to read twice.
    assert contamination.training_data(data, third) == ([data], [])
    assert contamination.training_data(own, None) == ([own], [])
    # Prepared again in place, or gone: what was trained on cannot be looked at any more.
    (data / "manifest.json").write_text((own / "manifest.json").read_text())
    gone = f"{data}/instruction/train.jsonl (instruction stage{contamination.OTHER_DATA})"
    assert contamination.training_data(own, third) == ([own], [gone])
    shutil.rmtree(stages["instruction_checkpoint"])
    directories, unchecked = contamination.training_data(own, third)
    assert directories == [own] and "instruction_checkpoint was trained on" in unchecked[0]
    result = json.loads((pipeline / "evaluation/final.json").read_text())
    assert result["contamination"]["unchecked"] == []
    result["contamination"]["unchecked"] = unchecked
    assert "WARNING: not looked at" in comparison.comparison_text({"final": result})
    page = report.render("report_template.html", report.report_facts({"final": result}))
    assert "Contamination was not looked for" in page


def test_short_benchmark_questions_and_abstracts_are_looked_for(pipeline, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline / "data/tiny", data)
    asked = "Which organ makes insulin in humans"
    abstract = " ".join(f"word{n}" for n in range(20))
    knowledge = [
        {"prompt": f"{asked}?", "context": None},
        {"prompt": "Is it so?", "context": f"Background. {abstract}"},
        {"prompt": "Which organ makes bile in all humans?", "context": None},
    ]
    rows = {"questions": [{"prompt": "What is the name of it?"}], "knowledge": knowledge}
    file = data / "instruction/train.jsonl"
    planted = [f"{asked}: heart, pancreas or skin?", f"Say more about {abstract}"]
    planted.append("Tell me, what is the name of it?")
    with file.open("a") as opened:
        opened.writelines(json.dumps({"prompt": p, "completion": "No."}) + "\n" for p in planted)
    manifest = json.loads((data / "manifest.json").read_text())
    manifest["files"]["instruction/train.jsonl"] = sha256_file(file)
    write_json(data / "manifest.json", manifest)
    found = contamination.contamination(rows, rows, [data])
    # A short question that is not a benchmark's is found as a whole only, as in preparation.
    assert found["by_set"] == {"questions": 0, "knowledge": 2}
    assert {text for _, text in found["examples"]} == {f"{asked}?", "Is it so?"}


def test_what_cannot_be_measured_or_compared_is_refused(pipeline, tmp_path, tiny_phi):
    script, out = ROOT / "evaluate_model.py", tmp_path / "out"
    copy_of = tmp_path / "final_b"
    shutil.copytree(pipeline / "final_checkpoint", copy_of)
    two = ("--checkpoint", "final_checkpoint", copy_of, "--output", out)
    assert "both be written to final.json" in fail(2, script, *two, cwd=pipeline)
    one = ("--checkpoint", "final_checkpoint")
    # A quick look does not take the place of what took longer.
    before = (pipeline / "evaluation/final.json").read_bytes()
    message = fail(2, script, *one, "--limit", "2", "--dry_run", cwd=pipeline)
    assert "--limit would replace it" in message and "quick_look" in message
    assert (pipeline / "evaluation/final.json").read_bytes() == before
    other = tmp_path / "other_base"
    shutil.copytree(tiny_phi, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["lm_head.bias"] = weights["lm_head.bias"] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    message = fail(2, script, *one, "--set", f"model.path={other}", cwd=pipeline)
    assert "another base model" in message
    assert "need --compare" in fail(2, script, *one, "--json", "t.json", cwd=pipeline)
    (tmp_path / "file").write_text("")
    message = fail(2, script, *one, "--output", tmp_path / "file", cwd=pipeline)
    assert "is a file" in message
    shutil.copy(pipeline / "liteguard_tiny.task", tmp_path / "renamed.task")
    record = (pipeline / "liteguard_tiny.task.json").read_text()
    (tmp_path / "renamed.task.json").write_text(record)
    message = fail(2, script, "--bundle", tmp_path / "renamed.task", cwd=pipeline)
    assert "keep the names" in message
    (tmp_path / "renamed.task.json").write_text(record[: len(record) // 2])
    message = fail(2, script, "--bundle", tmp_path / "renamed.task", cwd=pipeline)
    assert "is damaged" in message


def test_results_of_other_settings_are_not_compared(pipeline, tmp_path):
    result = json.loads((pipeline / "evaluation/final.json").read_text())
    names = []
    for number in range(3):
        names.append(str(tmp_path / f"run{number}/evaluation/final.json"))
        Path(names[-1]).parent.mkdir(parents=True)
        write_json(Path(names[-1]), result)
    found = comparison.read_results(names, tmp_path)
    assert list(found) == ["final", "evaluation/final", names[2]]
    with pytest.raises(UserError, match="there twice"):
        comparison.read_results([*names, names[2]], tmp_path)
    changed = copy.deepcopy(result)
    changed["inputs"]["evaluate"]["max_new_tokens"] += 1
    write_json(Path(names[1]), changed)
    with pytest.raises(UserError, match="not of the same rows"):
        comparison.read_results(names, tmp_path)


def test_rows_that_a_bundle_is_too_small_for_are_counted(pipeline, tmp_path, monkeypatch):
    monkeypatch.chdir(pipeline)
    config = build(
        [("tiny", json.loads(Path("final_checkpoint/stage.json").read_text())["config"])]
    )
    rows = held_out.held_out(config, Path("data/tiny"))
    rows["harmful"][0] = {**rows["harmful"][0], "prompt": "The heart " * 200}
    options = ["the heart", "the skin"]
    asked = {"set": "medqa", "context": None, "options": options, "answer": 0}
    rows["knowledge"] = [
        {**asked, "identifier": "a", "prompt": "Which organ beats?"},
        {**asked, "identifier": "b", "prompt": "The heart " * 200},
    ]
    journal = Journal(tmp_path / "x.jsonl", {})
    bundle = Path("liteguard_tiny.task")
    run.collect(lambda: answerers.open_answerer(config, bundle), config, rows, journal)
    result = summary.summarise(config, rows, journal)
    assert result["too_long"] == {"answers": 1, "options": 2}
    lost = next(a for a in result["answers"] if a["prompt"].startswith("The heart The heart"))
    assert (lost["answer"], lost["stopped"], lost["verdict"]) == ("", False, "unclear")
    assert [pick for _, pick, _ in result["knowledge"]["medqa"]["choices"]][1] is None
    assert result["knowledge"]["medqa"]["n"] == 2
    shown = json.loads((pipeline / "evaluation/bundle.json").read_text())
    assert shown["too_long"] == {"answers": 0, "options": 0}
    note = "Bundle: 1 prompts and 2 options do not fit its KV cache"
    assert note not in comparison.comparison_text({"bundle": shown})
    assert note in comparison.comparison_text({"bundle": {**shown, "too_long": result["too_long"]}})


# --- workers ------------------------------------------------------------------------------------


def bare_gb() -> float:
    """Peak memory of a process that does nothing, in GB."""
    code = "from liteguard import machine; print(machine.peak_rss_gb())"
    return float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))


def test_workers_answer_as_one_bundle_does(pipeline):
    from liteguard.errors import WorkError
    from liteguard.runtime.bundle import Bundle
    from liteguard.runtime.workers import BundleWorkers

    path = pipeline / "liteguard_tiny.task"
    prompts = [
        f"Instruct: What is the {organ} pain disease a?\nOutput:\n"
        for organ in ("heart", "skin", "lung", "eye", "ear")
    ]
    pairs = [("The", f" {organ} affects the lung.") for organ in ("heart", "skin", "eye")]
    several = BundleWorkers(path, workers=2, threads=1)
    with Bundle(path, threads=1) as single:
        expected = [single.generate(prompt, 24) for prompt in prompts]
        found = dict(several.generate(prompts, 24))
        assert [(found[i].text, found[i].tokens) for i in range(5)] == [
            (answer.text, answer.tokens) for answer in expected
        ]
        assert dict(several.score(pairs)) == dict(enumerate(single.score(*p) for p in pairs))
        # One of the two may have done all of a job, but no job is done in less than Python itself.
        assert several.peak_rss_gb > bare_gb()
        long = "The heart " * 200
        with pytest.raises(WorkError, match="must fit the KV cache"):
            list(several.generate([long], 4))
        # Where rows are measured, one that is too long does not end the evaluation.
        within = dict(several.generate([long, prompts[0]], 24, room=128))
        assert (within[0].text, within[0].tokens, within[0].stopped) == ("", 0, False)
        assert within[1].text == expected[0].text
        scores = dict(several.score([pairs[0], (long, " x"), pairs[1]], room=128))
        assert scores[1] == (None, 0)
        assert [scores[0], scores[2]] == [single.score(*pair) for pair in pairs[:2]]
        with pytest.raises(WorkError, match="was killed"):
            for _ in several.generate(prompts * 20, 24):
                # None is left when the pool has noticed the first, which may be just now.
                for child in multiprocessing.active_children()[:1]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)
