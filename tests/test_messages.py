"""What cannot be read is one short message with the right exit code, soon; never a traceback."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, STAGE_RECORD

import evaluate_model
from liteguard import (
    checkpoints,
    failures,
    machine,
    model_files,
    models,
    records,
    shown,
    yaml_text,
)
from liteguard import config as config_layers
from liteguard.cli import parser, resolve_config
from liteguard.errors import UserError, WorkError
from liteguard.evaluation import comparison, report, results
from liteguard.evaluation.journal import Journal
from liteguard.export import merge, possible

BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]"]
    + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
)


def refused(path: Path | None = None, *settings: str) -> str:
    """The message about a YAML file or settings that are no configuration."""
    path = path or ROOT / "configs/phi-2.yaml"
    args = parser("").parse_args(["--config", str(path), *(f"--set={s}" for s in settings)])
    begin = time.monotonic()
    with pytest.raises(UserError) as error:
        resolve_config(args)
    assert time.monotonic() - begin < 2, "a configuration is read within a second"
    assert len(str(error.value)) < shown.LONGEST
    return str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("domain: {max_steps: 2020-13-45}", "valid integer"),
        ("domain: {max_steps: !!int abc}", "the tag '!!int' is not read here"),
        ("a: !!python/object:os.system x", "is not read here"),
        ("domain: " + "[" * 3000 + "]" * 3000, "more than 20 levels"),
        ("domain: " + "{a: " * 30 + "}" * 30, "more than 20 levels"),
        ("domain: {max_steps: " + "9" * 5000 + "}", "domain.max_steps"),
        ("domain: {max_steps: " + "9" * 400 + "}", "larger than 1e+12"),
        ("domain: {learning_rate: 1e300}", "larger than 1e+12"),
        ("domain: {max_steps: -" + "9" * 20 + "}", "larger than 1e+12"),
        ("domain: &a {b: *a}", "an alias stands inside what it names"),
        (BOMB, "aliases stand for more than 10,000 values"),
        ("model_type: 'x\ny", "line 2"),
        ('prompt: {system: "\\uD800"}', "no text"),
        ('extends: "a\\0b"', "no text"),
        ("extends: 5", "extends must be the name of another YAML file, not 5"),
        ("extends: [a]", "extends must be"),
        ("domain: {max_steps: true}", "not true or false"),
        ("domain: {max_steps: 1:30}", "valid integer"),
        ("domain: {max_steps: 1.0e300}", "larger than 1e+12"),
        ("domain: {learning_rate: .inf}", "finite"),
        ("domain: {weight_decay: .nan}", "finite"),
        ("domain: {lora_targets: []}", "domain.lora_targets"),
        ("data: {language: klingon}", "data.language"),
        ("data: {min_characters: 30000}", "every row would be dropped"),
        ("model: {context_length: 1000}", "longer than model.context_length 1000"),
        ("{[a]: b}", "unhashable"),
        ("a" * (yaml_text.LONGEST + 1), "more than 100,000 bytes"),
        ("\n".join(f"key{n}: {'x' * 300}" for n in range(200)), "and 188 more"),
    ],
)
def test_a_yaml_that_is_no_configuration(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert said in refused(path)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: [" + "x, " * 33_000 + "]", "line 1, column 29996"),
        ("a:\n" + "- \n" * 33_000, "line 9999, column 2"),
        ("".join(f"{n}:\n" for n in range(14_000)), "line 5000, column 6"),
    ],
)
def test_many_values_are_refused_where_they_become_too_many(text, place):
    begin = time.process_time()
    with pytest.raises(yaml_text.BadYaml) as error:
        yaml_text.load(text)
    assert str(error.value) == f"more than 10,000 values ({place})"
    assert time.process_time() - begin < 2, "nothing is read after that"


def test_pipes_and_devices_are_no_configuration(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        assert "not a YAML file" in refused(path)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("domain.max_steps=2020-13-45", "valid integer"),
        ("domain.packing=!!bool x", "its value cannot be read"),
        ("domain.learning_rate=inf", "finite"),
        ("domain.learning_rate=nan", "finite"),
        ("safety.beta=1e999", "finite"),
        ("domain.max_steps=true", "not true or false"),
        ("domain.max_steps=1e300", "domain.max_steps"),
        ("data.domain.0=5", "data.domain.0: Input should be a valid dictionary"),
        ("data.domain.00.path=x", "data.domain: Input should be a valid list"),
        ("data.domain.².path=x", "write --set section.key=value"),
        ("data.domain.٠.path=x", "write --set section.key=value"),
        ("domain..max_steps=5", "write --set section.key=value"),
        ("a" + ".a" * 5000 + "=1", "write --set section.key=value"),
        ("=5", "write --set section.key=value"),
        ("evaluate.llm_judge={url: nonsense, model: m}", "not a URL"),
        ("evaluate.llm_judge={url: 'file:///etc/passwd', model: m}", "not a URL"),
        ("evaluate.llm_judge={url: 'localhost:8000/v1', model: m}", "not a URL"),
        ("evaluate.llm_judge={url: 'http://a:99999/', model: m}", "not a URL"),
    ],
)
def test_a_setting_that_cannot_be_meant(setting, said):
    assert said in refused(None, setting)


def test_settings_that_can_be_meant_are_taken():
    args = ["domain.learning_rate=2e-4", "data.instruction.1.limit=7", "domain.packing=no"]
    args += ["prompt.system=1e3", "model.revision=12e4567", "domain.lora_targets=[fc1]"]
    config = resolve_config(
        parser("").parse_args(
            ["--config", str(ROOT / "configs/phi-2.yaml"), *(f"--set={s}" for s in args)]
        )
    )
    assert config.domain.learning_rate == 2e-4 and not config.domain.packing
    assert config.data.instruction[1].limit == 7 and config.data.instruction[0].limit != 7
    assert (config.prompt.system, config.model.revision) == ("1e3", "12e4567")


def test_long_messages_are_cut_in_the_middle():
    text = shown.message("begin " + "x" * 4_000_000 + " end")
    assert len(text) <= shown.LONGEST and text.startswith("begin") and text.endswith("end")
    assert "characters left out" in text
    assert len(shown.message("\x1b" * 10_000)) <= shown.LONGEST
    assert shown.message("short") == "short"


# --- from an exception to an exit code ------------------------------------------------------------
def system(number: int, path: str = "/nowhere/x") -> OSError:
    return OSError(number, os.strerror(number), path)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a"), 2, "error: a"),
        (WorkError("a"), 1, "error: a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (system(errno.ENOSPC), 1, "the disk is full"),
        (RuntimeError("x (os error 28)"), 1, "the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:626]"), 1, "cannot write"),
        (system(errno.EACCES), 1, "cannot write: /nowhere/x"),
        (system(errno.EROFS), 1, "cannot write: /nowhere/x"),
        (MemoryError(), 1, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "not enough memory"),
        (system(errno.EIO), 1, "the disk fails"),
        (RuntimeError("can't start new thread"), 1, "no more processes, threads or open files"),
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), 1, "no more processes"),
        (RuntimeError("unable to mmap: Too many open files (24)"), 1, "no more processes"),
        (system(errno.EMFILE), 1, "(/nowhere/x: Too many open files)"),
        (ImportError("a.so: failed to map segment from shared object"), 1, "ulimit -v"),
        *(
            (system(number), 1, f"the system refused /nowhere/x: {os.strerror(number)}")
            for number in (errno.EBUSY, errno.ESTALE, errno.ENOLCK, errno.EXDEV, errno.ETIMEDOUT)
        ),
        (OSError(errno.ESTALE, "Stale file handle"), 1, f"refused [Errno {errno.ESTALE}] Stale"),
        (system(errno.ETXTBSY), 1, "the system refused /nowhere/x: Text file busy"),
        (system(errno.ENOENT), 2, "/nowhere/x: No such file or directory"),
        (system(errno.ENAMETOOLONG), 2, "File name too long"),
        (system(errno.EISDIR), 2, "Is a directory"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 1, "what read the output is gone"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "x"), 2, "not UTF-8"),
    ],
)
def test_each_way_to_fail_has_one_exit_code(error, code, said):
    told = failures.explain(error)
    assert told is not None and told[1] == code and said in told[0]


@pytest.mark.parametrize(
    "text",
    ["can't start new thread", "CUDA out of memory. Tried to allocate", "x (os error 24)"],
)
def test_what_the_machine_refuses_is_no_damaged_file(text):
    """A training loop takes smaller batches where it sees the second kind."""
    with pytest.raises(RuntimeError, match=re.escape(text)), model_files.reading("x"):
        raise RuntimeError(text)
    with pytest.raises(UserError, match="x cannot be used"), model_files.reading("x"):
        raise RuntimeError("invalid header")


def test_an_input_that_may_not_be_read_is_no_lack_of_disk(tmp_path, monkeypatch):
    path = tmp_path / "s.jsonl"
    path.write_text("{}")
    # root may read everything
    monkeypatch.setattr(failures.os, "access", lambda *_: False)
    text, code = failures.explain(system(errno.EACCES, str(path)))
    assert code == 2 and f"cannot read {path}: Permission denied" in text and "space" not in text

    def closed(_):
        raise PermissionError

    monkeypatch.setattr(failures.Path, "exists", closed)  # its directory may not be entered
    assert failures.explain(system(errno.EACCES, str(path)))[1] == 2


def test_mistakes_of_the_program_keep_their_traceback():
    assert failures.explain(KeyError("x")) is None
    assert failures.explain(OSError("no number")) is None
    try:
        try:
            raise system(errno.ENOENT)
        except OSError:
            raise AttributeError("ours") from None
    except AttributeError as error:
        assert failures.explain(error) is None


@pytest.mark.parametrize("name", [".", "/", "..", "a/.."])
def test_an_output_has_a_name(name):
    with pytest.raises(UserError, match="name a new directory"):
        checkpoints.work_directory(Path(name))


SCRIPT = "from liteguard import cli\n{}\ncli.run(main)"


def script(body: str, **options) -> subprocess.Popen:
    code = SCRIPT.format("def main():\n    " + body.replace("\n", "\n    "))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    return subprocess.Popen([sys.executable, "-c", code], **pipes | options)


def test_output_that_nobody_reads():
    process = script("for _ in range(100_000): print('x' * 80)")
    process.stdout.readline()
    process.stdout.close()
    message = process.stderr.read()
    assert process.wait() == 1 and "what read the output is gone" in message
    assert "Traceback" not in message and "Exception ignored" not in message


def test_a_terminal_of_ascii_only():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    body = "from liteguard.errors import UserError\nprint('café')\nraise UserError('né\\x1b[2J')"
    out, message = script(body, env=environment).communicate()
    assert "caf\\xe9" in out and message == "\nerror: n\\xe9\\x1b[2J\n"


def test_ctrl_c_while_libraries_are_imported():
    """Before cli.run: the package says it, from its first line on."""
    # What a test before this one set, or a shell that started this in the background, is inherited.
    code = (
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import liteguard\nos.kill(os.getpid(), signal.SIGINT)\nimport json.tool"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == -signal.SIGINT
    assert process.stderr.strip() == "interrupted; run the same command again to go on"


def test_children_do_not_hear_ctrl_c():
    from liteguard.machine import starting_children

    before = signal.getsignal(signal.SIGINT)
    with starting_children():
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE,
        )
    assert signal.getsignal(signal.SIGINT) is before
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.3)
    child.kill()
    child.wait()


# --- JSON of another shape ------------------------------------------------------------------------
def result() -> dict:
    counts = {"refused": 1, "answered": 0, "unclear": 0}
    answer = {"set": "harmful", "kind": "harmful", "area": "fraud", "prompt": "p", "answer": "a"}
    answer |= {"reference": "r", "verdict": "refused", "stopped": True}
    cost = dict.fromkeys(("wall_s", "scoring_s", "generation_s", "peak_rss_gb"), 1.0)
    cost |= {"scored_tokens": 1, "generated_tokens": 1, "answer_s": dict.fromkeys("abcde", 1.0)}
    lengths = {"max_new_tokens": 1, "max_text_tokens": 1, "context_words": 1}
    return {
        "perplexity": 2.0,
        "n": {"perplexity": 1},
        "intervals": {"perplexity": [1.0, 3.0]},
        "verdicts": {name: counts for name in ("harmful", "ordinary", "borderline")},
        "areas": {name: {"fraud": counts} for name in ("harmful", "ordinary", "borderline")},
        "guide_areas": {"fraud": counts},
        "knowledge": {},
        "too_long": {"answers": 0, "options": 0},
        "answers": [answer],
        "bleu_signature": "s",
        "contamination": {
            **{"rows": 1, "training_rows": 1, "found": 0, "measured": 0},
            **{"examples": [], "unchecked": []},
        },
        "cost": cost,
        "model": {"name": "n", "path": None, "data_dir": "/nowhere"},
        "inputs": {"evaluate": lengths, "rows": {}},
    }


@pytest.mark.parametrize("name", ["base.json", "base.partial.jsonl"])
@pytest.mark.parametrize("content", ['{"my": "settings"}', "[1]", '{"a": 1, // mine', None])
def test_a_measurement_replaces_no_file_of_others(tmp_path, monkeypatch, name, content):
    """A link is refused before the work as well, wherever it leads."""
    path = tmp_path / name
    if content is None:
        path.symlink_to("nowhere")
    else:
        path.write_text(content)
    results.check_places(tmp_path, ["final"])
    command = ["evaluate_model.py", "--base", "--model_type", "smollm2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=rf"{name} (was not written by|is a symbolic link)"):
        evaluate_model.main()


def test_a_measurement_replaces_its_own_files(tmp_path):
    """Whole, cut by a full disk, or empty; and a journal of other inputs."""
    path = tmp_path / "final.json"
    checkpoints.write_json(path, result())
    whole = path.read_text()
    for text in (whole, whole[: whole.index("bleu")], ""):
        path.write_text(text)
        results.check_places(tmp_path, ["final"])
    with Journal(tmp_path / "final.partial.jsonl", {"a": 1}):
        results.check_places(tmp_path, ["final"])


def compared() -> dict:
    """A result with the numbers that a model card shows."""
    refusals = dict.fromkeys(("refused_harmful", "refused_benign"), 1)
    found = result() | refusals | {"n": {"perplexity": 1, **refusals}}
    found["intervals"] |= dict.fromkeys(refusals, [0.5, 1.0])
    return found


@pytest.mark.parametrize("name", ["report.html", "MODEL_CARD.md", "table.md", "table.json"])
def test_a_comparison_replaces_no_file_of_others(tmp_path, name):
    """What it wrote itself it knows by a line that all versions have written."""
    path = tmp_path / name
    places = (tmp_path, str(tmp_path / "table.md"), str(tmp_path / "table.json"))
    report.write_report({"final": compared()}, *places)
    report.check_places(*places)
    path.write_text("My notes on LiteGuard")
    with pytest.raises(UserError, match=f"{name} was not written by"):
        report.check_places(*places)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(UserError, match=f"{name} is a symbolic link"):
        report.check_places(*places)


def test_two_comparisons_do_not_write_one_report(tmp_path):
    checkpoints.write_json(tmp_path / "final.json", compared())
    names = ("config", "model_type", "model", "markdown", "json", "dry_run", "require_ship")
    args = argparse.Namespace(**dict.fromkeys(names), settings=[], sets=[])
    args.output, args.compare = str(tmp_path), ["final"]
    with (
        machine.one_at_a_time(tmp_path / ".report.lock"),
        pytest.raises(UserError, match=r"report\.html is being made by process"),
    ):
        evaluate_model.compare(args)
    assert not (tmp_path / "report.html").exists()
    evaluate_model.compare(args)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UserError, match="and would be replaced"):
        evaluate_model.compare(args)
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_whole_result_is_compared(tmp_path):
    checkpoints.write_json(tmp_path / "final.json", result())
    found = comparison.read_results(["final"], tmp_path)
    assert "Perplexity" in comparison.comparison_text(found)
    assert results.reuse(tmp_path / "final.json", result()["inputs"]) == result()


def with_sets() -> dict:
    """A result of benchmarks, an outside set and requests as apps send them."""
    found = result()
    share = {"refused": 0.5, "n": 2, "interval": [0.1, 0.9]}
    numbers = {"kind": "questions", "file": "f", "rouge1": 0.5, "n": {"rouge1": 1}}
    found["sets"] = {"nih": {**numbers, "intervals": {"rouge1": [0.1, 0.9]}}}
    found["inputs"]["sets"] = {"nih": {}}
    found["as_used"] = {"draws": 2, "numbers": {"harmful": {"drawn": share}}, "answers": []}
    counts = dict.fromkeys(("n", "unparsed", "repeated_options"), 1)
    shares = dict.fromkeys(("accuracy", "chance", "majority", "overlap"), 0.5)
    rest = {"interval": [0.1, 0.9], "choices": [["q", 1, 2]]}
    found["knowledge"] = {"medqa": counts | shares | rest}
    return found


def put(found: dict, path: str, value: object) -> None:
    """Set what lies at a path of keys and positions; "missing" takes it away."""
    *above, last = path.split(".")
    place = found
    for key in above:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    if value == "missing":
        del place[last]


def test_a_whole_result_with_sets_is_compared(tmp_path):
    for odd in (with_sets(), with_sets() | {"as_used": {}}):
        checkpoints.write_json(tmp_path / "final.json", odd)
        found = comparison.read_results(["final"], tmp_path)
        comparison.comparison_json(found)
        assert "nih: ROUGE-1" in comparison.comparison_text(found)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("as_used", {"x": 1}),
        ("as_used.numbers", [1]),
        ("as_used.numbers.harmful", {"drawn": {}}),
        ("as_used.numbers.harmful.drawn.interval", "x"),
        ("sets", {}),
        ("sets.nih.rouge1", "x"),
        ("sets.nih.intervals.rouge1", "x"),
        ("sets.nih.kind", "x"),
        ("sets.nih.refused", 0.5),
        ("knowledge.medqa.choices", [[]]),
        ("knowledge.medqa.interval", [1]),
        ("n", {}),
        ("inputs.sets", "x"),
    ],
)
def test_a_result_whose_sets_are_of_another_shape(tmp_path, path, value):
    found = with_sets()
    if path == "n":
        del found["perplexity"]
    put(found, path, value)
    (tmp_path / "final.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="final.json is damaged"):
        comparison.read_results(["final"], tmp_path)
    assert results.reuse(tmp_path / "final.json", found["inputs"]) is None


STEP = {"step": "answers", "measured": "4 of 4", "tolerance": "4", "passed": True}


@pytest.mark.parametrize(
    "verify",
    [
        *("x", [1], {"steps": "abc"}, {"steps": [1]}, {"steps": None}, {"steps": {"a": STEP}}),
        *({"steps": [STEP, odd]} for odd in ({"passed": False}, {"step": "a"}, {"step": 1})),
        {"steps": [{**STEP, "passed": "maybe"}]},
    ],
)
def test_a_bundle_record_whose_proof_is_of_another_shape(tmp_path, verify):
    path = tmp_path / "x.task.json"
    parts = dict.fromkeys(("bytes", "merge", "tokenizer", "quantize", "bundles"), {})
    record = {**STAGE_RECORD, **parts, "stage": "bundle", "export": {"kv_cache_length": 9}}
    record |= {"files": {}, "inputs": {"a": 1}}
    for steps, failed in (([STEP], []), ([STEP, {**STEP, "passed": False}], ["answers"])):
        proof = {"steps": steps, "runtime_cache_bytes": 5}
        checkpoints.write_json(path, record | {"verify": proof})
        read = records.read(records.BundleRecord, path)
        assert read.verify.failed == failed and read.to_dict()["verify"] == proof
    checkpoints.write_json(path, record | {"verify": verify})
    with pytest.raises(
        UserError, match=r"x\.task\.json is damaged, or of another version \(verify"
    ):
        records.read(records.BundleRecord, path)


@pytest.mark.parametrize(
    "path",
    [
        *("guide_areas", "bleu_signature", "answers", "n", "n.perplexity", "verdicts.harmful"),
        *("verdicts.harmful.refused", "cost.answer_s", "cost.peak_rss_gb", "inputs.evaluate"),
        *("answers.0.answer", "answers.0.verdict", "contamination.found", "model.path"),
        *("inputs.evaluate.max_new_tokens", "intervals", "perplexity", "too_long"),
    ],
)
@pytest.mark.parametrize("value", [None, [], "x", "missing"])
def test_a_result_of_another_shape(tmp_path, path, value):
    found = result()
    put(found, path, value)
    texts = ("answers.0.answer", "answers.0.verdict", "bleu_signature", "model.path")
    no_fault = [*((name, "x") for name in texts), ("model.path", None), ("perplexity", "missing")]
    if (path, value) in no_fault:
        comparison.comparison_text({"final": found})
        return
    (tmp_path / "final.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="final.json is damaged"):
        comparison.read_results(["final"], tmp_path)
    assert results.reuse(tmp_path / "final.json", result()["inputs"]) is None


ROW = b'{"prompt": "p", "completion": "c"}\n'


@pytest.mark.parametrize(
    "content",
    [ROW + ROW[:20], b"[1]\n", b'{"prompt": "p"}\n', b'{"prompt": null, "completion": "c"}\n']
    + ['{"prompt": "é", "completion": "c"}\n'.encode("latin-1"), b"", b"[" * 100_000],
)
def test_prepared_rows_that_were_changed(tmp_path, content):
    """Every train script and compress_model.py read some of every part, before all else."""
    name = "instruction/validation.jsonl"
    path = tmp_path / name
    path.parent.mkdir()
    path.write_bytes(ROW)
    manifest = {"model_type": "phi2", "files": {name: checkpoints.sha256_file(path)}}
    checkpoints.write_json(tmp_path / "manifest.json", manifest)
    (tmp_path / "domain").mkdir()
    (tmp_path / "domain/validation.jsonl").write_bytes(content)  # nothing of the prepared data
    assert possible.sample(tmp_path) == (["p", "c"], ["p"])
    path.write_bytes(content)
    with pytest.raises(UserError, match="was changed after it was prepared"):
        possible.sample(tmp_path)
    manifest["files"][name] = checkpoints.sha256_file(path)  # changed with its sha256
    checkpoints.write_json(tmp_path / "manifest.json", manifest)
    with pytest.raises(UserError, match=r"Prepare it again: python prepare_datasets\.py"):
        possible.sample(tmp_path)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{", b"", b"\xff\xfe", b"[" * 100_000])
def test_records_that_are_none(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    for kind in (records.StageRecord, records.BundleRecord, records.Manifest, records.Result):
        with pytest.raises(UserError, match=r"x\.json"):
            records.read(kind, path)
    assert results.reuse(path, {}) is None
    (tmp_path / checkpoints.INPUTS).write_bytes(content)
    assert checkpoints.begun_from(tmp_path) is None


@pytest.mark.parametrize(
    "line",
    [b"{}", b"[]", b"no", b"\xff", b'["answers", 0, {}, 1]', b'["answers", 0, 5, 1]']
    + [b'["x", 0, {}, 1]', b'["answers", "0", {}, 1]', b'["scores", 0, [1], 1]', b"[" * 100_000],
)
def test_a_damaged_journal_is_kept_up_to_the_damage(tmp_path, line, capsys):
    path = tmp_path / "final.partial.jsonl"
    answer = {"text": "a", "tokens": 1, "stopped": True, "seconds": 0.1}
    with Journal(path, {"a": 1}) as journal:
        journal.add("answers", 0, answer, 0.5)
        journal.add("scores", 0, [-1.5, 3], 0.5)
        journal.add("scores", 1, [None, 0], 0.5)
        journal.add("judged", 0, {"verdict": "refused", "text": "r", "tokens": 1})
        journal.add_run(peak_rss_gb=1.0)
    whole = path.read_bytes()
    path.write_bytes(whole + line + b"\n" + whole.split(b"\n", 1)[1])
    with Journal(path, {"a": 1}) as journal:
        assert journal.found["answers"] == {0: answer} and len(journal.found["scores"]) == 2
    assert path.read_bytes() == whole and "damaged" in capsys.readouterr().out


# --- folders of models ----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole_base(tmp_path_factory):
    import torch
    from transformers import PhiConfig, PhiForCausalLM

    directory = tmp_path_factory.mktemp("base")
    shape = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    torch.manual_seed(0)
    PhiForCausalLM(PhiConfig(**shape, num_attention_heads=2)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("model.safetensors", lambda data: data[:-500], "holds no weights that can be used"),
        ("model.safetensors", lambda data: b"", "holds no weights that can be used"),
        ("config.json", lambda data: b"{", "it is no JSON"),
        ("config.json", lambda data: b"[]", "holds a list"),
        ("config.json", lambda data: b"{}", "cannot be used"),
        (
            "config.json",
            lambda data: data.replace(b'"hidden_size": 16', b'"hidden_size": 32'),
            "another shape|holds no weights",
        ),
        (
            "config.json",
            lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 3'),
            "do not belong together",
        ),
        (
            "config.json",
            lambda data: data.replace(b'"num_hidden_layers": 2', b'"num_hidden_layers": 1'),
            "have more layers",
        ),
        (
            "config.json",
            lambda data: data.replace(b": 2048", b": 512"),
            "model.context_length 2048 is more than this base model can read: 512",
        ),
    ],
)
def test_a_damaged_base_model(whole_base, tmp_path, file, change, said):
    for path in whole_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / file
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before
    settings = {"model": {"name": "x/y", "path": str(tmp_path)}}
    with pytest.raises(UserError, match=said):
        models.model_config(config_layers.build([("test", settings)]))
        models.load_weights(tmp_path)


def test_a_damaged_tokenizer(tmp_path):
    from liteguard.prompts import Prompt

    for content in ("{", "[]", "{}", ""):
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
        with pytest.raises(UserError, match="holds no tokenizer that can be used"):
            models.load_tokenizer(str(tmp_path), Prompt(), 100)


def test_a_damaged_tokenizer_of_a_checkpoint(whole_base, tmp_path, monkeypatch):
    """The merge reads it first: compress_model.py, publish.py and the GGUF go through it."""
    from liteguard.prompts import Prompt

    monkeypatch.setattr(merge.model_files, "check_adapter", lambda directory: None)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=f"{tmp_path} holds no tokenizer that can be used"):
        merge.merge_adapter(whole_base, tmp_path, tmp_path / "merged", Prompt())
