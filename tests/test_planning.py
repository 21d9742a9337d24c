"""plan.py: what is computed from shapes, and from the moments of a probe's progress lines."""

from __future__ import annotations

import json
import runpy
import sys

import pytest
from conftest import CACHE, ROOT

from liteguard import planning, planning_probe, registry
from liteguard.config import build, read_yaml
from liteguard.errors import WorkError
from liteguard.planning_probe import Measuring, Speed, probe_config, read_moments, speed_of
from liteguard.training.memory_terms import read_shapes

GB = 10**9


def load(name: str, **sections):
    return build([(name, read_yaml(ROOT / f"configs/{name}.yaml")), ("test", sections)])


def progress(stage: str, speeds: list[float], step_tokens: list[float], start: float):
    """The lines of a run whose steps have these speeds (tokens/s), with their moments."""
    at, lines = start, [(1.0, "LoRA on q_proj x30: 9,768,960 trainable parameters")]
    for step, (speed, count) in enumerate(zip(speeds, step_tokens, strict=True), 1):
        at += count / speed
        text = f"  {stage} {step}/{len(speeds)}  train_loss 3.1  learning_rate 0.001  1 tok/s (1)"
        lines.append((at, text))
    lines.append((at + 6.0, f"  {stage} {len(speeds)}/{len(speeds)}  eval_loss 3.181"))
    return lines, at + 6.0


def test_a_stage_is_start_steps_evaluations_and_finish():
    lines, end = progress("domain", [50, 100, 100, 25, 100], [1000] * 5, 15.0)
    speed = speed_of(read_moments("domain", lines), [1000] * 5, end + 4)
    # The slow step is another program's; the first one also made what is made once.
    assert speed.token == pytest.approx(0.01)
    assert speed.start == pytest.approx(15 + 10)
    assert (speed.evaluation, speed.finish) == (pytest.approx(6), pytest.approx(4))
    assert speed.seconds(14_000, 2) == pytest.approx(25 + 140 + 12 + 4)
    with pytest.raises(WorkError, match="no progress"):
        speed_of(read_moments("safety", lines), [1000] * 5, end)


# make demo, 29 November, on two cores that others used as well: tokens/s of the first five steps,
# tokens of each, tokens of all steps, how often it validated, measured seconds of the stage.
MEASURED = {
    "domain": ([130, 124, 116, 38, 118], [993] * 5, 13_805, 2, 159.7),
    "safety": ([79, 88, 90, 84, 86], [656, 612, 505, 606, 640], 17_551, 2, 261.1),
}


@pytest.mark.parametrize("stage", MEASURED)
def test_the_demos_stages_are_foreseen_to_20_percent(stage):
    speeds, tokens, whole, evaluations, measured = MEASURED[stage]
    lines, end = progress(stage, speeds, tokens, 12.0)
    speed = speed_of(read_moments(stage, lines), tokens, end + 10)
    assert speed.seconds(whole, evaluations) == pytest.approx(measured, rel=0.2)


def test_the_probe_takes_the_real_micro_batches_and_few_of_them():
    phi, small = load("phi-2"), load("smollm2-135m")
    gpu = probe_config(phi, "domain", cuda=True).domain
    assert (gpu.batch_size, gpu.gradient_accumulation) == (4, 1)
    cpu = probe_config(phi, "domain", cuda=False).domain
    assert (cpu.batch_size, cpu.gradient_accumulation) == (1, 1)
    # The demo's steps are as small as that already.
    own = probe_config(small, "domain", cuda=False).domain
    assert (own.batch_size, own.gradient_accumulation, own.max_steps) == (8, 1, 5)
    assert (own.eval_steps, own.logging_steps, own.report_to) == (5, 1, [])
    rows = probe_config(small, "instruction", cuda=False).instruction
    assert (rows.batch_size, rows.gradient_accumulation) == (8, 2)
    assert probe_config(phi, "safety", cuda=False).safety.chosen_drop_limit is None
    lengths = list(range(100))
    steps = planning_probe.tokens_of_steps(small, small, "instruction", lengths)
    assert steps[0] == sum(range(16)) and steps[6] == sum(lengths[96:] + lengths[:12])


def test_a_probe_that_fails_says_so():
    with pytest.raises(WorkError, match=r"(?s)domain.py failed \(exit code 2\).*--dry_run"):
        planning_probe.run(["train_domain.py", "--config", "none.yaml"], "train_domain.py")


def test_cards_for_phi_2_are_those_of_its_two_files():
    config = load("phi-2")
    architecture, why = planning.shapes(config)
    assert architecture.hidden_size == 2560 and "not downloaded" in why
    lines = planning.cards(config, architecture)
    assert len(lines) == 3
    for line in lines:
        assert ": 48 GB (L40S); 8 GB (RTX 4060) with batch_size 1" in line
    eight = planning.cards(load("phi-2_8gb"), architecture)
    assert all(line.endswith("8 GB (RTX 4060)") for line in eight)


def test_steps_without_a_probe_have_memory_and_disk_and_no_minutes():
    config = load("phi-2")
    architecture, _ = planning.shapes(config)
    step = planning.compress_step(config, architecture, None)
    assert step.seconds is None and "?" in step.note
    # benchmarks/full_size_report.json: 13.4 GB, and 29.6 GB on top of what was there, with one
    # container; the other one takes 2.8 GB more.
    assert step.memory == pytest.approx(14.0 * GB, rel=0.1)
    assert step.disk == pytest.approx(32.4 * GB, rel=0.1)
    speed = Measuring(loading=10, scored_token=1e-3, knowledge_row=0.5, generated_token=1e-2)
    more = planning.evaluate_step(config, architecture, speed, 1.0, 4)
    fewer = planning.evaluate_step(config, architecture, speed, 1.0, 1)
    used = 32 * (3 + 6)  # harmful requests: three draws, six other ways
    answers = (5 * 256 + used) * 160  # of as many tokens as are allowed
    rows = 256 * config.evaluate.max_text_tokens
    one = 1e-2 * answers + 1e-3 * rows + 0.5 * config.evaluate.knowledge_rows
    assert more.seconds - fewer.seconds == pytest.approx(3 * (10 + one))
    # Sets of other hands are asked and scored as well, harmful ones in every way.
    own = [
        {"name": "q", "path": "q.csv", "kind": "questions", "rows": 60},
        {"name": "h", "path": "h.csv", "kind": "harmful", "rows": 120},
    ]
    asked = load("phi-2", evaluate={"sets": own})
    with_sets = planning.evaluate_step(asked, architecture, speed, 1.0, 4).seconds - more.seconds
    alone = with_sets - planning.evaluate_step(asked, architecture, speed, 1.0, 1).seconds
    one = 1e-2 * (60 + 120 + used) * 160 + 1e-3 * 60 * config.evaluate.max_text_tokens
    assert alone + fewer.seconds == pytest.approx(3 * one)
    text = planning.table([step, more], 4 * GB, 10 * GB)
    assert "4.0 GB is free here" in text and "10.0 GB is free here" in text
    assert "?" in text.splitlines()[-3] and planning.minutes(None) == "?"


@pytest.mark.parametrize("shape", ["phi2", "phi1_5"])
def test_the_measured_conversions_are_foreseen_to_20_percent(shape, monkeypatch):
    """On the machine that they were measured on; the answers of their proof are 28 as there, and
    where they were drawn as well, 18 more."""
    report = json.loads((ROOT / "benchmarks/full_size_report.json").read_text())[shape]
    config = load({"phi2": "phi-2", "phi1_5": "phi-1_5"}[shape])
    verify = config.compress.verify.model_copy(update={"questions": 12, "requests": 16})
    section = config.compress.model_copy(update={"verify": verify})
    config = config.model_copy(update={"compress": section})
    architecture, _ = planning.shapes(config)
    assert planning.proof_answers(config) == 28 + 18
    if not any(step["step"] == "drawn answers" for step in report["proof"]):
        monkeypatch.setattr(planning, "proof_answers", lambda _: 28)
    seconds = planning.compress_step(config, architecture, 1.0).seconds
    assert seconds == pytest.approx(report["steps"]["compress"]["wall_s"], rel=0.2)


def test_the_base_models_own_answers_take_their_time():
    """500 questions of 128 tokens, at their longest, and a pass of the base over what it says."""
    config = load("smollm2-135m")
    speed = Measuring(loading=10, scored_token=1e-3, knowledge_row=0.5, generated_token=2e-3)
    step = planning.prepare_step(config, 20_000, 1.0, speed)
    assert step.seconds == pytest.approx(10 + 10 + 128) and step.note == "done"
    before = planning.prepare_step(config, None, None, None)
    assert before.seconds is None and "up to 64,000 tokens of answers" in before.note
    assert "tokens" not in planning.prepare_step(load("phi-2"), None, None, None).note
    architecture = planning.smollm2_architecture()
    trained = Speed(start=5, token=0.01, evaluation=1, finish=1)
    lengths = [50] * 100
    parts = (config, "instruction", architecture, False, lengths, trained)
    without = planning.training_step(*parts)
    taught = planning.training_step(*parts, planning_probe.Taught(tokens=3000, targets=2000))
    assert taught.disk - without.disk == 2 * 577 * 2000
    assert taught.seconds - without.seconds == pytest.approx(planning.TEACHING * 0.01 * 3000)


def test_calibration_and_smoothing_take_their_time():
    """What the demo turns on; for each recipe that is tried, calibration is of its own."""
    demo, plain = load("smollm2-135m"), load("smollm2-135m", compress={"calibrate": False})
    architecture = planning.smollm2_architecture()
    whole = planning.compress_step(demo, architecture, 1.0).seconds
    less = planning.compress_step(plain, architecture, 1.0).seconds
    assert whole - less == pytest.approx(5 + 290 * 0.1345, rel=0.01)


def test_a_slower_machine_takes_longer():
    fast = {"instruction": Speed(1, 134.5e6 / planning.REFERENCE_SPEED, 1, 1)}
    slow = {"instruction": Speed(1, 2 * 134.5e6 / planning.REFERENCE_SPEED, 1, 1)}
    assert planning.slowness(fast, 134_500_000, False, 2) == pytest.approx(1)
    assert planning.slowness(slow, 134_500_000, False, 2) == pytest.approx(2)
    assert planning.slowness(slow, 134_500_000, True, 16) == 0.5  # a GPU trained


@pytest.mark.parametrize(
    ("seconds", "text"), [(24, "0.4 min"), (599, "10.0 min"), (840, "14 min"), (11_520, "3.2 h")]
)
def test_minutes_are_read_at_a_glance(seconds, text):
    assert planning.minutes(seconds) == text


# --- the script -----------------------------------------------------------------------------------
def plan(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "plan.py"))["main"]()
    return capsys.readouterr().out


def test_the_script_says_what_is_not_here_and_gives_the_rest(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed = plan(monkeypatch, capsys, "--model", "microsoft/phi-2")
    assert "2.78 billion parameters" in printed
    assert "not downloaded yet" in printed and "no prepared data in data/phi2" in printed
    steps = ("prepare", "domain", "instruction", "safety", "compress", "evaluate", "all")
    lines = [line.split() for line in printed.splitlines() if line.startswith(steps)]
    assert [line[0] for line in lines] == [*steps] and {line[1] for line in lines} == {"?"}
    assert [*tmp_path.iterdir()] == []  # nothing is written or fetched


def test_the_tokens_of_a_plan_are_those_of_the_run(pipeline, monkeypatch, capsys, tiny_config):
    """On the finished stages of the tiny model; the probe's scripts are stood in for."""
    monkeypatch.chdir(pipeline)
    seen = {}

    def fake(command, what):
        seen[what] = command
        if what == "evaluate_model.py":
            cost = {"scoring_s": 1.0, "scored_tokens": 10, "options_s": 0.0, "option_tokens": 0}
            cost |= {"generation_s": 2.0, "generated_tokens": 10}
            folder = planning_probe.Path(command[-1])
            folder.mkdir()
            result = json.loads((pipeline / "evaluation/final.json").read_text())
            (folder / "final.json").write_text(json.dumps(result | {"cost": result["cost"] | cost}))
            return [], 13.0
        stage = what.removeprefix("train_").removesuffix(".py")
        return (found := progress(stage, [100] * 5, [400] * 5, 10.0)[0]), found[-1][0] + 5

    monkeypatch.setattr(planning_probe, "run", fake)
    lengths = {}
    real = planning_probe.lengths_of
    monkeypatch.setattr(
        planning_probe,
        "lengths_of",
        lambda c, stage, *rest: lengths.setdefault(stage, real(c, stage, *rest)),
    )
    printed = plan(monkeypatch, capsys, "--config", tiny_config)
    assert "?" not in printed and "No probe" not in printed
    for stage, folder in zip(lengths, ("domain", "instruction", "final"), strict=True):
        record = json.loads((pipeline / f"{folder}_checkpoint/stage.json").read_text())
        trained, rel = record["metrics"]["tokens"], 0.1 if stage == "domain" else 1e-9
        assert sum(lengths[stage]) == pytest.approx(trained, rel=rel), stage
    # Each stage goes on from the one before, and all of it is gone afterwards.
    assert "--checkpoint" not in seen["train_domain.py"]
    parent = seen["train_safety.py"][seen["train_safety.py"].index("--checkpoint") + 1]
    assert parent.endswith("/instruction") and not planning_probe.Path(parent).exists()


def test_the_embedded_model_is_planned_before_it_is_unpacked(tmp_path):
    """A new machine has no base model yet; its published shapes are those of the real one."""
    published, why = planning.shapes(load("smollm2-135m", data={"cache_dir": str(tmp_path)}))
    assert "not unpacked yet" in why
    registry.MODELS[planning.SMOLLM2](planning.SMOLLM2, CACHE)
    here, why = planning.shapes(load("smollm2-135m", data={"cache_dir": str(CACHE)}))
    assert not why and read_shapes(here) == read_shapes(published)
