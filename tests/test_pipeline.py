"""The six real scripts on a 2-layer Phi model: files, hand-offs, LoRA targets, resume, errors."""

from __future__ import annotations

import json
import math
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, fail, succeed

PHI_LAYERS = {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}


def record(path: Path) -> dict:
    return json.loads((path / "stage.json").read_text())


def logs(pipeline: Path) -> dict[str, str]:
    return json.loads((pipeline / "logs.json").read_text())


def test_every_step_leaves_what_it_promises(pipeline):
    assert {p.name for p in (pipeline / "data" / "tiny").iterdir()} == {
        "domain",
        "instruction",
        "preference",
        "manifest.json",
        "dropped.jsonl",
        "NOTICE.md",
    }
    for name in ("domain_checkpoint", "instruction_checkpoint", "final_checkpoint"):
        found = {p.name for p in (pipeline / name).iterdir()}
        assert {
            "adapter_model.safetensors",
            "adapter_config.json",
            "tokenizer.json",
            "stage.json",
            "curves.png",
            "log_history.json",
        } <= found
        assert not [f for f in found if f.endswith((".bin", ".pt", ".pth", ".pkl"))], "pickles"
        assert (pipeline / name / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (pipeline / "liteguard_tiny.task").stat().st_size > 100_000
    hidden = [p.name for p in pipeline.iterdir() if p.name.startswith(".") and p.name != ".cache"]
    hidden += [p.name for p in (pipeline / ".cache").rglob("*") if "partial" in p.name]
    assert not hidden, f"left behind: {hidden}"


def test_lora_hits_every_attention_and_ffn_layer(pipeline):
    from safetensors import safe_open

    with safe_open(pipeline / "domain_checkpoint" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
        changed = [n for n in names if "lora_B" in n and file.get_tensor(n).abs().max() > 0]
    for layer in range(2):
        hit = {n.split(".")[-3] for n in names if f".layers.{layer}." in n}
        assert hit == PHI_LAYERS
    assert len(changed) == 2 * len(PHI_LAYERS), "some layers were never trained"


def test_the_same_adapter_is_carried_through(pipeline):
    import torch
    from safetensors.torch import load_file

    stages = ["domain_checkpoint", "instruction_checkpoint", "final_checkpoint"]
    tensors = [load_file(pipeline / s / "adapter_model.safetensors") for s in stages]
    for before, after in zip(tensors, tensors[1:], strict=False):
        assert before.keys() == after.keys()
        moved = [k for k in before if not torch.equal(before[k], after[k])]
        assert len(moved) == len(before), "a stage did not train every matrix"
        # Carried on, not started again: far closer than two random adapters would be.
        a = torch.cat([t.flatten() for k, t in before.items() if "lora_A" in k])
        b = torch.cat([t.flatten() for k, t in after.items() if "lora_A" in k])
        assert torch.cosine_similarity(a, b, dim=0) > 0.9
    final = record(pipeline / "final_checkpoint")
    assert final["parent"] == "instruction_checkpoint"
    parent = record(pipeline / "instruction_checkpoint")["files"]["adapter_model.safetensors"]
    assert final["parent_adapter_sha256"] == parent


def test_small_steps_are_not_rounded_away(pipeline):
    """TRL rounds adapters on 4-bit bases to bfloat16, where a step of 1e-5 is lost."""
    from safetensors.torch import load_file

    stages = ["domain_checkpoint", "instruction_checkpoint", "final_checkpoint"]
    tensors = [load_file(pipeline / s / "adapter_model.safetensors") for s in stages]
    for found in tensors:
        assert all(not t.bfloat16().float().equal(t) for t in found.values())
    for before, after in zip(tensors, tensors[1:], strict=False):
        for name in before:
            moved = (before[name] != after[name]).float().mean()
            assert moved > 0.95, f"{name}: {1 - moved:.0%} of the weights never moved"


def test_dpo_starts_at_ln2_with_zero_margins(pipeline):
    first = next(
        e
        for e in json.loads((pipeline / "final_checkpoint/log_history.json").read_text())
        if "loss" in e
    )
    # 4-bit products are computed by other kernels with and without gradients: 5e-3 covers that.
    assert first["loss"] == pytest.approx(math.log(2), abs=5e-3)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-2)
    assert "frozen copy of instruction_checkpoint" in logs(pipeline)["safety"]


def test_stage_3_says_what_it_is_going_to_train_on(pipeline):
    log = logs(pipeline)["safety"]
    [mixture] = re.findall(r"^train pairs: .*", log, re.MULTILINE)
    assert re.fullmatch(
        r"train pairs: ordinary \d+ \(\d+%\), harmful \d+ \(\d+%\); "
        r"sources: preferences.jsonl 100% \(24 of its \d+\)",
        mixture,
    ), mixture
    assert log.index(mixture) < log.index("safety 1/6")


def test_stage_json_says_what_was_done(pipeline):
    for name, stage in (("domain_checkpoint", "domain"), ("final_checkpoint", "safety")):
        found = record(pipeline / name)
        assert found["stage"] == stage
        assert found["base_identity"].startswith("sha256:")
        assert found["config"]["domain"]["lora_rank"] == 8
        assert found["metrics"]["steps"] == 6
        assert found["wall_s"] > 0 and found["peak_rss_gb"] > 0
        assert {"torch", "trl", "peft"} <= found["versions"].keys()


def test_both_bases_are_measured_on_the_same_rows(pipeline, monkeypatch):
    """Against the merged model's own logits; NF4 differs from it, and both are said."""
    import torch

    from liteguard import checkpoints, merged
    from liteguard.config import validate
    from liteguard.training import tokens

    monkeypatch.chdir(pipeline)
    for stage in ("domain", "instruction", "safety"):
        found = record(Path(OUTPUTS[stage]))["metrics"]["both_bases"]
        assert found["storage"] == "nf4" and found["rows"] == 8
        assert 0 < abs(found["trained_loss"] - found["shipped_loss"]) < 0.5
        assert found["shipped_perplexity"] == pytest.approx(math.exp(found["shipped_loss"]))
        printed = logs(pipeline)[stage]
        assert (
            f" {found['trained_perplexity']:.2f} on the base as trained on (stored as nf4)"
            in printed
        )
        assert f" {found['shipped_perplexity']:.2f} on the 16-bit base that ships" in printed
        assert record(Path(OUTPUTS[stage]))["metrics"]["best_eval_loss"] == pytest.approx(
            min(losses(Path(OUTPUTS[stage]), "eval_loss"))
        )
    # The rows are few enough here for the validation loss to be about the same ones.
    for stage in ("domain", "instruction"):
        metrics = record(Path(OUTPUTS[stage]))["metrics"]
        assert metrics["both_bases"]["trained_loss"] == pytest.approx(
            metrics["best_eval_loss"], rel=0.01
        )
    path = Path("instruction_checkpoint")
    own = validate(checkpoints.read_stage(path).config, "instruction_checkpoint")
    model, tokenizer = merged.load_merged(own, path)
    rows = tokens.answers(tokenizer, Path("data/tiny"), "validation", own, 8)
    total = 0.0
    for row in range(8):
        ids, labels = (torch.from_numpy(part)[None] for part in rows.row(row))
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
        wanted = labels[0, 1:] != -100
        total -= scores[wanted].gather(1, labels[0, 1:][wanted, None]).sum().item()
    found = record(path)["metrics"]["both_bases"]
    assert found["tokens"] == rows.supervised.sum()
    assert found["shipped_loss"] == pytest.approx(total / found["tokens"], rel=1e-4)


def test_progress_shows_loss_and_speed_and_wandb_got_the_keys(pipeline):
    assert "train_loss" in logs(pipeline)["domain"]
    assert re.search(r"\d tok/s \([\d,]+ supervised\)", logs(pipeline)["domain"])
    runs = list(pipeline.glob("wandb/offline-run-*/*.wandb"))
    assert len(runs) == 1
    content = runs[0].read_bytes()
    for key in (b"train_loss", b"learning_rate", b"gpu_memory", b"tokens_per_second"):
        assert key in content, key


def test_tensorboard_gets_the_same_keys(pipeline):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(pipeline / "runs" / "tiny-domain"))
    events.Reload()
    keys = events.Tags()["scalars"]
    assert {"train_loss", "eval_loss", "learning_rate", "gpu_memory", "tokens_per_second"} <= {
        *keys
    }
    history = json.loads((pipeline / "domain_checkpoint/log_history.json").read_text())
    losses = {row["step"]: row["loss"] for row in history if "loss" in row}
    logged = {event.step: event.value for event in events.Scalars("train_loss")}
    assert logged == pytest.approx(losses, rel=1e-5) and len(logged) == 6


def test_wandb_and_trackio_are_called_alike(monkeypatch):
    from liteguard.training import tracking

    calls = []
    fake = SimpleNamespace(
        init=lambda **named: calls.append(("init", named["project"], named["name"])),
        log=lambda values, step: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    (tracker,) = tracking.start(["trackio"], "phi2-domain", {"seed": 0}, 0)
    tracker.log({"train_loss": 2.0}, 10)
    tracker.finish()
    assert calls == [
        ("init", "liteguard", "phi2-domain"),
        ("log", {"train_loss": 2.0}, 10),
        ("finish",),
    ]


def test_bundle_and_checkpoint_agree(pipeline):
    final = json.loads((pipeline / "evaluation/final.json").read_text())
    bundle = json.loads((pipeline / "evaluation/bundle.json").read_text())
    assert bundle["n"] == final["n"]
    # The bundle cannot write single bytes. In this vocabulary they are 128 of 640 tokens, and an
    # untrained model gives them some per cent of its probability, which goes to the others.
    assert 0.92 * final["perplexity"] < bundle["perplexity"] < 1.01 * final["perplexity"]
    same = sum(
        a["answer"] == b["answer"] for a, b in zip(final["answers"], bundle["answers"], strict=True)
    )
    assert same >= len(final["answers"]) // 2, "int8 and 16-bit answers differ in most cases"
    assert sum(a["stopped"] for a in bundle["answers"]) >= len(bundle["answers"]) // 2


def test_running_again_reuses_everything(pipeline, tiny_config):
    before = (pipeline / "domain_checkpoint/stage.json").stat().st_mtime_ns
    assert "reused" in succeed(ROOT / "prepare_datasets.py", "--config", tiny_config, cwd=pipeline)
    flags = ("--config", tiny_config, "--set", "domain.report_to=[tensorboard]")
    again = succeed(ROOT / "train_domain.py", *flags, cwd=pipeline)
    assert "reused" in again and again.splitlines()[-1] == logs(pipeline)["domain"].splitlines()[-1]
    # Both containers are the default, which --also names.
    command = (ROOT / "compress_model.py", "--input", "final_checkpoint")
    assert "reused" in succeed(*command, "--verify", "full", cwd=pipeline)
    # A proof of another kind has not been given.
    message = fail(2, *command, "--verify", "none", cwd=pipeline)
    assert "made from other inputs" in message and "verify" in message
    assert (pipeline / "domain_checkpoint/stage.json").stat().st_mtime_ns == before


def test_a_gguf_beside_a_finished_bundle(pipeline):
    """Made without converting again, kept when nothing changed, and never in another's place."""
    import gguf

    command = (ROOT / "compress_model.py", "--input", "final_checkpoint", "--verify", "full")
    command += ("--also", "gguf")
    file, record = (pipeline / f"liteguard_tiny.gguf{end}" for end in ("", ".json"))
    assert "liteguard_tiny.gguf; proof" in succeed(*command, "--dry_run", cwd=pipeline)
    said = succeed(*command, cwd=pipeline)
    assert "reused" in said and "wrote liteguard_tiny.gguf" in said
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(file)).tensors}
    assert kinds == {"F32", "Q8_0"} and json.loads(record.read_text())["inputs"]["adapter"]
    content = file.read_bytes()
    assert "kept" in succeed(*command, cwd=pipeline)
    file.write_bytes(content[:1000])
    assert "wrote" in succeed(*command, cwd=pipeline) and file.read_bytes() == content
    record.unlink()
    message = fail(2, *command, cwd=pipeline)
    assert "was not written by LiteGuard" in message and file.read_bytes() == content
    file.unlink()
    assert not list(pipeline.glob(".*gguf.partial"))


STAGE_COMMANDS = {
    "domain": ("train_domain.py", ()),
    "instruction": ("train_instruction.py", ("--checkpoint", "domain_checkpoint")),
    "safety": ("train_safety.py", ("--checkpoint", "instruction_checkpoint")),
}
OUTPUTS = {
    "domain": "domain_checkpoint",
    "instruction": "instruction_checkpoint",
    "safety": "final_checkpoint",
}


def kill_at(line: str, command: list[str], cwd: Path, env: dict[str, str] | None = None) -> None:
    """Run a script until it prints a line that begins so, then kill -9."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for printed in process.stdout:
        if printed.strip().startswith(line):
            process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("stage", STAGE_COMMANDS)
def test_killed_training_goes_on_to_the_very_same_adapter(pipeline, tiny_config, tmp_path, stage):
    """kill -9 in a step after the first checkpoint; the uninterrupted run is the pipeline's."""
    script, parent = STAGE_COMMANDS[stage]
    output = tmp_path / OUTPUTS[stage]
    command = [str(ROOT / script), *parent, "--config", str(tiny_config), "--output", str(output)]
    step = random.choice([4, 5])
    kill_at(f"{stage} {step}/6", command, pipeline)
    assert not output.exists()
    if stage == "domain":
        # The next stage says what to do instead of using half a checkpoint.
        message = fail(2, ROOT / "train_instruction.py", "--checkpoint", output, cwd=tmp_path)
        assert "not finished" in message
        # Other inputs cannot be mixed into interrupted work.
        message = fail(2, *command, "--set", "domain.learning_rate=5e-4", cwd=pipeline)
        assert "domain.learning_rate" in message and "--overwrite" in message
    assert "resuming from checkpoint-" in succeed(*command, cwd=pipeline)
    found, uninterrupted = record(output), record(pipeline / OUTPUTS[stage])
    assert found["metrics"]["steps"] == 6 and found["metrics"]["resumed_from"]
    assert (
        found["files"]["adapter_model.safetensors"]
        == uninterrupted["files"]["adapter_model.safetensors"]
    ), f"killed in step {step}: another adapter than without interruption"
    assert found["metrics"]["tokens"] == uninterrupted["metrics"]["tokens"]


def test_a_run_that_had_stopped_early_takes_no_further_step(pipeline, tiny_config, tmp_path):
    """Killed between its last step and its publishing, as in a score that takes minutes."""
    command = [str(ROOT / "train_domain.py"), "--config", str(tiny_config)]
    early = {"learning_rate": 1.0, "eval_steps": 1, "save_steps": 1, "early_stopping_patience": 2}
    for name, value in early.items():
        command += ["--set", f"domain.{name}={value}"]
    outputs = {name: tmp_path / name for name in ("whole", "killed")}
    said = succeed(*command, "--output", outputs["whole"], cwd=pipeline)
    steps = record(outputs["whole"])["metrics"]["steps"]
    assert steps < 6 and f"domain: {steps} steps," in said
    kill_at(f"domain: {steps} steps,", [*command, "--output", str(outputs["killed"])], pipeline)
    succeed(*command, "--output", outputs["killed"], cwd=pipeline)
    one, other = (record(path) for path in outputs.values())
    for key in ("steps", "tokens", "best_eval_loss"):
        assert one["metrics"][key] == other["metrics"][key], key
    assert losses(outputs["whole"], "eval_loss") == losses(outputs["killed"], "eval_loss")
    assert one["files"]["adapter_model.safetensors"] == other["files"]["adapter_model.safetensors"]


def losses(directory: Path, key: str = "loss") -> list[float]:
    history = json.loads((directory / "log_history.json").read_text())
    return [entry[key] for entry in history if key in entry]


def test_reference_scored_once_gives_the_same_training(pipeline, tmp_path):
    command = (ROOT / "train_safety.py", "--checkpoint", "instruction_checkpoint", "--output")
    once = tmp_path / "once"
    log = succeed(*command, once, "--set", "safety.precompute_reference=true", cwd=pipeline)
    assert "scored once, then dropped from memory" in log
    assert losses(once) == pytest.approx(losses(pipeline / "final_checkpoint"), abs=1e-5)


def test_padded_rows_train_the_same_and_cost_padding(pipeline, tmp_path):
    command = (ROOT / "train_instruction.py", "--checkpoint", "domain_checkpoint", "--output")
    padded = tmp_path / "padded"
    succeed(*command, padded, "--set", "instruction.packing=false", cwd=pipeline)
    found, packed = (
        record(padded)["metrics"],
        record(pipeline / "instruction_checkpoint")["metrics"],
    )
    assert found["padding_share"] > 0.01 and packed["padding_share"] == 0
    assert found["supervised_tokens"] == packed["supervised_tokens"]
    # bfloat16 where the CPU has it: sums in another order differ in the third digit.
    assert losses(padded) == pytest.approx(losses(pipeline / "instruction_checkpoint"), rel=0.03)


def test_loss_reduction_is_what_the_first_step_says(pipeline, tmp_path):
    """Against the parent's log-probabilities of the same rows, one row a micro-batch."""
    import torch

    from liteguard import checkpoints, merged
    from liteguard.config import validate
    from liteguard.training import tokens

    command = (ROOT / "train_instruction.py", "--checkpoint", "domain_checkpoint", "--output")
    flags = ("instruction.batch_size=1", "instruction.gradient_accumulation=4")
    flags += (
        "instruction.max_steps=1",
        "model.compute_dtype=float32",
        "instruction.quantization=none",
    )
    data = json.loads((pipeline / "domain_checkpoint/stage.json").read_text())["data_dir"]
    own = validate(
        checkpoints.read_stage(pipeline / "domain_checkpoint").config, "domain_checkpoint"
    )
    model, tokenizer = merged.load_merged(own, pipeline / "domain_checkpoint")
    rows = tokens.answers(tokenizer, pipeline / data, "train", own, 4)
    sums = []
    for row in range(4):
        ids, labels = (torch.from_numpy(part)[None] for part in rows.row(row))
        with torch.no_grad():
            scores = model(ids).logits[0, :-1].float().log_softmax(-1)
        picked = scores.gather(1, labels[0, 1:, None].clamp(min=0))[:, 0]
        sums.append(-picked[labels[0, 1:] != -100].sum().item())
    counts = rows.supervised[:4]
    for reduction, power in (("token", 0), ("square", 0.5), ("sample", 1)):
        wanted = (sums / counts**power).sum() / (counts ** (1 - power)).sum()
        output = tmp_path / reduction
        settings = (*flags, f"instruction.loss_reduction={reduction}")
        pairs = [part for setting in settings for part in ("--set", setting)]
        succeed(*command, output, *pairs, cwd=pipeline)
        assert losses(output)[0] == pytest.approx(wanted, rel=5e-5)


def test_memory_that_runs_out_halves_the_micro_batch(pipeline, tmp_path, tiny_config):
    """The real script; attempts with more than one row a micro-batch fail as they do on CUDA."""
    script = tmp_path / "train.py"
    script.write_text(
        f"""
import runpy, sys, torch
sys.path.insert(0, {str(ROOT)!r})
from liteguard.training import loop
train = loop.train
def failing(stage, trainer, counts):
    if stage.section.batch_size > 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB")
    return train(stage, trainer, counts)
loop.train = failing
sys.argv[0] = {str(ROOT / "train_instruction.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    )
    output = tmp_path / "smaller"
    command = (script, "--checkpoint", "domain_checkpoint", "--output", output)
    log = succeed(*command, cwd=pipeline, fresh=False)
    assert "out of memory with micro-batch 4 x 1" in log and "2 x 2" in log and "1 x 4" in log
    found = record(output)
    assert [step["batch_size"] for step in found["metrics"]["out_of_memory"]] == [4, 2]
    assert found["config"]["instruction"]["batch_size"] == 4, "the configuration is the user's"
    for key, what in (("loss", "effective batch"), ("eval_loss", "validation loss")):
        same = losses(pipeline / "instruction_checkpoint", key)
        assert losses(output, key) == pytest.approx(same, rel=0.03), f"the {what} changed"


def test_losing_the_chosen_answers_stops_stage_3(pipeline, tiny_config, tmp_path, monkeypatch):
    """DPO may lower both answers of a pair; the guard sees it in what TRL logs at evaluations."""
    from types import SimpleNamespace

    from transformers import TrainerControl

    from liteguard.config import build, read_yaml
    from liteguard.training import callbacks
    from liteguard.training.stage import plan

    history = json.loads((pipeline / "final_checkpoint/log_history.json").read_text())
    assert any("eval_rewards/chosen" in entry for entry in history)
    monkeypatch.chdir(pipeline)
    config = build([("tiny", read_yaml(tiny_config))])
    parent = Path("instruction_checkpoint")
    stage = plan("safety", config, tmp_path / "x", Path("data/tiny"), parent).at(tmp_path)
    guard = callbacks.stage_callbacks(stage)[0]
    # beta is 0.1: a reward of -2.9 is a loss of 29 nats, the limit is 30.
    for reward, stops in ((-2.9, False), (-3.1, True)):
        control, metrics = TrainerControl(), {"eval_loss": 0.1, "eval_rewards/chosen": reward}
        guard.on_evaluate(None, SimpleNamespace(global_step=3), control, metrics=metrics)
        assert control.should_training_stop is stops
        assert math.isinf(metrics["eval_loss"]) is stops, "it must not be kept as the best"


def test_answers_lost_at_the_first_evaluation_publish_nothing(pipeline, tmp_path):
    """What the guard has just rejected is not the result."""
    output = tmp_path / "lost"
    command = (ROOT / "train_safety.py", "--checkpoint", "instruction_checkpoint", "--output")
    hot = ("--set", "safety.learning_rate=0.05", "--set", "safety.chosen_drop_limit=0.5")
    message = fail(1, *command, output, *hot, cwd=pipeline)
    assert "nothing was published" in message and "safety.learning_rate (now 0.05)" in message
    assert not output.exists()


def test_every_evaluated_step_has_a_checkpoint(pipeline, tiny_config, tmp_path, monkeypatch):
    """Or the best of them could not be published; those of `save_steps` come on top."""
    from transformers import TrainerControl

    from liteguard.config import build, read_yaml
    from liteguard.training import callbacks
    from liteguard.training.arguments import trainer_arguments
    from liteguard.training.stage import plan

    monkeypatch.chdir(pipeline)
    often = {"domain": {"eval_steps": 2, "save_steps": 3}}
    config = build([("tiny", read_yaml(tiny_config)), ("test", often)])
    stage = plan("domain", config, tmp_path / "x", Path("data/tiny")).at(tmp_path)
    arguments = trainer_arguments(stage)
    assert arguments["save_steps"] == arguments["eval_steps"] == 2
    assert arguments["load_best_model_at_end"]
    guard = callbacks.stage_callbacks(stage)[0]
    saved = []
    for step in range(1, 6):
        control = TrainerControl()
        guard.on_step_end(None, SimpleNamespace(global_step=step, max_steps=6), control)
        saved.append(control.should_save)
    assert saved == [False, False, True, False, False]
    short = {"model": {"context_length": 1024}}
    shorter = build([("tiny", read_yaml(tiny_config)), ("test", short)])
    other = plan("domain", shorter, tmp_path / "x", Path("data/tiny"))
    assert other.inputs["context_length"] != stage.inputs["context_length"]


def test_a_killed_run_stops_early_where_it_would_have(pipeline, tiny_config, tmp_path):
    """Steps too small to change anything: the first evaluation stays the best, and after three
    more the run ends, wherever it was killed."""
    output = tmp_path / "early"
    command = [str(ROOT / "train_domain.py"), "--config", str(tiny_config), "--output", str(output)]
    settings = {"learning_rate": "1e-30", "eval_steps": 1, "save_steps": 1, "max_steps": 8}
    for name, value in settings.items():
        command += ["--set", f"domain.{name}={value}"]
    kill_at("domain 3/8", command, pipeline)
    succeed(*command, cwd=pipeline)
    found = record(output)["metrics"]
    assert found["resumed_from"] and found["steps"] == 4


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("safety.optimizer=adamw_tourch", "should be 'adamw_torch', 'adamw_torch_fused'"),
        ("safety.kind_weights={harmfull: 2}", "Kinds in the data: harmful, ordinary"),
    ],
)
def test_misspelt_names_are_a_users_mistake(pipeline, tmp_path, setting, says):
    command = (ROOT / "train_safety.py", "--checkpoint", "instruction_checkpoint", "--output")
    message = fail(2, *command, tmp_path / "x", "--set", setting, cwd=pipeline)
    assert says in message and not (tmp_path / "x").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(pipeline, tmp_path):
    output = tmp_path / "hot"
    command = (ROOT / "train_instruction.py", "--checkpoint", "domain_checkpoint", "--output")
    hot = ("--set", "instruction.learning_rate=1e12", "--set", "instruction.max_grad_norm=1e12")
    message = fail(1, *command, output, *hot, cwd=pipeline)
    assert "not finite" in message and "instruction.learning_rate" in message
    assert not output.exists()
    work = tmp_path / ".hot.partial"
    if "batch in" in message:
        from safetensors.torch import load_file

        batch = load_file(work / "bad_batch.safetensors")
        assert batch["input_ids"].shape == batch["labels"].shape


@pytest.mark.parametrize(
    ("script", "flag", "given", "needs"),
    [
        ("train_instruction.py", "--checkpoint", "instruction_checkpoint", "domain"),
        ("train_safety.py", "--checkpoint", "domain_checkpoint", "instruction"),
        ("compress_model.py", "--input", "instruction_checkpoint", "safety"),
    ],
)
def test_wrong_order_of_stages(pipeline, script, flag, given, needs):
    message = fail(2, ROOT / script, flag, given, "--output", "never.task", cwd=pipeline)
    assert f"'{needs}' checkpoint is needed" in message and "python train_" in message
    assert not (pipeline / "never.task").exists()


def test_missing_and_damaged_checkpoints(pipeline, tmp_path):
    message = fail(2, ROOT / "train_safety.py", "--checkpoint", "nowhere", cwd=tmp_path)
    assert "no checkpoint directory nowhere" in message and "train_instruction.py" in message
    half = tmp_path / "half"
    shutil.copytree(pipeline / "instruction_checkpoint", half)
    (half / "stage.json").unlink()
    assert "no stage.json" in fail(2, ROOT / "train_safety.py", "--checkpoint", half, cwd=tmp_path)
    shutil.rmtree(half)
    shutil.copytree(pipeline / "instruction_checkpoint", half)
    weights = half / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "sha256 differs" in fail(2, ROOT / "train_safety.py", "--checkpoint", half, cwd=tmp_path)
    weights.unlink()
    assert "is missing" in fail(2, ROOT / "train_safety.py", "--checkpoint", half, cwd=tmp_path)


def test_another_prompt_or_base_is_refused(pipeline, tmp_path, tiny_phi):
    message = fail(
        2,
        ROOT / "train_instruction.py",
        "--checkpoint",
        "domain_checkpoint",
        "--output",
        tmp_path / "x",
        "--set",
        "prompt.user_prefix=Question>",
        cwd=pipeline,
    )
    assert "another prompt" in message and "user_prefix" in message
    other = tmp_path / "other_base"
    shutil.copytree(tiny_phi, other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["lm_head.bias"] = weights["lm_head.bias"] + 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    message = fail(
        2,
        ROOT / "train_instruction.py",
        "--checkpoint",
        "domain_checkpoint",
        "--output",
        tmp_path / "x",
        "--set",
        f"model.path={other}",
        cwd=pipeline,
    )
    assert "another base model" in message


def test_changed_or_empty_data_is_refused(pipeline, tiny_config, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pipeline / "data/tiny", data)
    (data / "domain/train.jsonl").write_text("")
    message = fail(
        2, ROOT / "train_domain.py", "--config", tiny_config, "--data", data, cwd=tmp_path
    )
    assert "changed after it was prepared" in message and "prepare_datasets.py" in message
    message = fail(
        2,
        ROOT / "train_domain.py",
        "--config",
        tiny_config,
        "--data",
        tmp_path / "none",
        cwd=tmp_path,
    )
    assert "No prepared data" in message


def test_full_disk_leaves_nothing_under_the_final_name(pipeline, tiny_config, tmp_path):
    """Every write past 40 KB fails, as on a full disk (the errno differs, the path does not)."""
    shutil.copytree(pipeline / "data", tmp_path / "data")

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    message = fail(
        1, ROOT / "train_domain.py", "--config", tiny_config, cwd=tmp_path, preexec_fn=limit
    )
    assert "cannot write" in message and "run the same command again" in message
    assert not (tmp_path / "domain_checkpoint").exists()
    message = fail(
        1,
        ROOT / "prepare_datasets.py",
        "--config",
        tiny_config,
        "--output",
        tmp_path / "d2",
        cwd=tmp_path,
        preexec_fn=limit,
    )
    assert "cannot write" in message and not (tmp_path / "d2").exists()
    message = fail(
        1,
        ROOT / "compress_model.py",
        "--input",
        pipeline / "final_checkpoint",
        "--output",
        tmp_path / "x.task",
        cwd=pipeline,
        preexec_fn=limit,
    )
    assert not (tmp_path / "x.task").exists()
    # With room again the same command finishes.
    succeed(ROOT / "train_domain.py", "--config", tiny_config, cwd=tmp_path)
    assert (tmp_path / "domain_checkpoint/stage.json").exists()


def test_scripts_end_with_what_was_made_how_good_it_is_and_what_comes_next(pipeline):
    found, took = logs(pipeline), r"\d+(\.\d)? (s|min)"
    told = {
        "prepare": rf"wrote data/tiny: [\d,]+ training rows \(.*\), \d+ held out .*; {took}",
        "domain": rf"wrote domain_checkpoint: adapter .*, validation perplexity [\d.]+; {took}",
        "safety": rf"wrote final_checkpoint: .* \d+% of validation pairs told apart; {took}",
        "compress": rf"int8 weights, proven .*: perplexity [+-]\d.*% of answers .*tok/s.*; {took}",
        "evaluate": rf"Bundle: perplexity .*, harmful refused \d+%.*; 5 measured in {took}",
    }
    for name, said in told.items():
        closing, following = found[name].splitlines()[-2:]
        assert re.fullmatch(said, closing), closing
        assert following.startswith("next: python ")
    # wandb says what it does; no other library does, and one's own warnings are on stdout.
    loud = {name for name, text in found.items() if name.endswith(", stderr") and text.strip()}
    assert loud <= {"instruction, stderr"}


def test_a_stage_may_train_against_the_16_bit_base(pipeline):
    command = (ROOT / "train_instruction.py", "--checkpoint", "domain_checkpoint", "--dry_run")
    other = ("--output", "other", "--set", "instruction.quantization=none")
    assert "base stored as nf4" in succeed(*command, "--output", "other", cwd=pipeline)
    assert "base not quantised" in succeed(*command, *other, cwd=pipeline)
    # It is one of the inputs: the finished checkpoint was made with NF4 and is not reused.
    message = fail(2, *command[:-1], "--set", "instruction.quantization=none", cwd=pipeline)
    assert "quantization" in message and "nf4" in message
