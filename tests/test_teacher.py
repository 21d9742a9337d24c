"""Distributions as targets: what the base model expects, instead of a row's words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, succeed
from test_distributed import launch, losses
from test_packing import adapted, batch, packed, run
from test_pipeline import kill_at

from liteguard.errors import UserError
from liteguard.training import teacher
from liteguard.training.packing import Collator, Lesson
from liteguard.training.tokens import TokenRows


@pytest.mark.parametrize("biased", [True, False])
def test_a_distribution_is_scored_and_pulls_as_its_definition_says(biased):
    """Cross-entropy and its gradient over the whole vocabulary, written out."""
    import torch

    from liteguard.training.loss_head import TILE, TargetScores, expected_rows

    torch.manual_seed(0)
    vocabulary = 2 * TILE + 7
    weight = torch.randn(vocabulary, 16) * 0.3
    bias = torch.randn(vocabulary) if biased else None
    hidden = torch.randn(7, 16, requires_grad=True)
    targets, taught = torch.randint(0, vocabulary, (7,)), torch.randn(3, 16)
    soft = torch.tensor([0, 1, 1, 0, 1, 0, 0]).bool()
    counts = torch.rand(7)

    def head(states):
        return torch.nn.functional.linear(states, weight, bias)

    chances = head(taught).softmax(-1)
    logs = head(hidden).log_softmax(-1)
    wanted = torch.nn.functional.one_hot(targets, vocabulary).float()
    wanted[soft] = chances
    expected = (wanted * logs).sum(-1)
    (expected * counts).sum().backward()
    gradient, hidden.grad = hidden.grad, None

    lines = expected_rows(taught, weight, bias)
    torch.testing.assert_close(lines[:, :-1], chances @ weight)
    torch.testing.assert_close(lines[:, -1], chances @ bias if biased else torch.zeros(3))
    found, _, _, is_top = TargetScores.apply(hidden, weight, bias, targets, soft, lines)
    (found * counts).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-3, atol=1e-5)
    assert is_top.equal(head(hidden).argmax(-1) == targets)  # the row's own words, all the same


def rows_of(inputs, soft: list[bool]) -> TokenRows:
    """The rows of a padded batch as TokenRows."""
    lengths = inputs["attention_mask"].sum(1).numpy()
    ends = lengths.cumsum()
    ids = inputs["input_ids"][inputs["attention_mask"].bool()].numpy().astype(np.uint32)
    return TokenRows(ids, ends - lengths, ends, lengths // 3, soft=np.array(soft))


def lesson_for(model, rows: TokenRows) -> Lesson:
    """What the model expects, written row by row, without the functions that are tested."""
    import torch

    starts, lines = {}, []
    head = model.get_output_embeddings()
    for number in np.flatnonzero(rows.soft).tolist():
        starts[number] = len(lines)
        ids, labels = (torch.from_numpy(part) for part in rows.row(number))
        with torch.no_grad():
            chances = model(input_ids=ids[None]).logits[0].softmax(-1)
        for place in range(1, len(ids)):
            if labels[place] != -100:
                row = chances[place - 1]
                mean = [row @ head.weight, (row @ head.bias)[None]]
                lines.append(torch.cat(mean).half().numpy())
    return Lesson(starts, np.stack(lines))


def test_what_it_expects_itself_teaches_a_model_nothing(tiny_phi):
    """Packed or padded, the words of soft rows pull nowhere and hard ones as they did."""
    model = adapted(tiny_phi, "sdpa")
    inputs = batch((11, 12, 9))
    hard, soft = rows_of(inputs, [False] * 3), rows_of(inputs, [True, False, True])
    item = [{"part": "train", "rows": [0, 1, 2]}]
    plain = Collator({"train": hard}, 0)(item)
    collator = Collator({"train": soft}, 0)
    collator.lesson = lesson_for(model, soft)
    taught = collator(item)
    assert taught["soft"].sum() == len(taught["expected"]) == 8 + 6
    alone = Collator({"train": hard}, 0)([{"part": "train", "rows": [1]}])
    _, of_words = run(model, plain)
    _, of_middle = run(model, alone)
    for own in (model, packed(model)):
        outputs, gradients = run(own, taught)
        for name, gradient in gradients.items():
            left = (gradient - of_middle[name]).abs().max()
            assert left <= 2e-3 * of_words[name].abs().max(), name
        places = taught["soft"][:, 1:]
        entropy = -outputs.log_probs[places]  # a distribution's cross-entropy with itself
        assert abs(entropy - outputs.entropy[places]).max() < 1e-2


def test_rows_of_validation_keep_their_words(tiny_phi):
    rows = rows_of(batch((11, 12)), [True, True])
    collator = Collator({"train": rows, "validation": rows}, 0)
    collator.lesson = lesson_for(adapted(tiny_phi, "sdpa"), rows)
    assert "soft" not in collator([{"part": "validation", "rows": [0, 1]}])
    assert "soft" in collator([{"part": "train", "rows": [1]}])


@pytest.fixture(scope="module")
def parents(tiny_config, tmp_path_factory):
    """Two finished stages 1 of the tiny model: one that learnt, one that is all but the base."""
    work = tmp_path_factory.mktemp("parents")
    succeed(ROOT / "prepare_datasets.py", "--config", tiny_config, "--output", work / "data")
    command = [ROOT / "train_domain.py", "--config", tiny_config, "--data", work / "data"]
    for name, rate in (("learnt", 1e-2), ("still", 1e-9)):
        rate = f"domain.learning_rate={rate}"
        succeed(*command, "--output", work / name, "--set", rate)
    return work


@pytest.fixture
def distilling(parents, tiny_config, tmp_path):
    """The words of a stage 2 with distilled answers only, from a parent to an output."""
    content = yaml.safe_load(tiny_config.read_text())
    content["data"]["instruction"][0]["distill"] = True
    config, data = tmp_path / "distill.yaml", tmp_path / "data"
    config.write_text(yaml.safe_dump(content))
    succeed(ROOT / "prepare_datasets.py", "--config", config, "--output", data)

    def command(parent: str, output: str) -> list[str]:
        words = [ROOT / "train_instruction.py", "--checkpoint", parents / parent]
        words += ["--config", config, "--data", data, "--output", tmp_path / output]
        return [*map(str, words)]

    return command


def test_a_model_that_is_still_its_base_begins_at_its_own_entropy(distilling, tmp_path):
    """Whatever the words say; validation is about them all the same."""
    assert "distilled: " in succeed(*distilling("still", "out"))
    log = json.loads((tmp_path / "out/log_history.json").read_text())
    first = next(entry for entry in log if "loss" in entry)
    assert first["loss"] == pytest.approx(first["entropy"], rel=1e-2)  # of bfloat16
    hard = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert all(abs(loss - first["entropy"]) > 0.05 for loss in hard)
    assert not [*tmp_path.rglob("teacher.npy")]


def test_the_base_teaches_and_a_resumed_run_is_taught_the_same(distilling, tmp_path):
    """By no adapter: not the parent's, nor the one that was trained until the kill."""
    lessons = {}
    for parent in ("learnt", "still"):
        kill_at("instruction 4/6", distilling(parent, f"killed_{parent}"), tmp_path)
        (kept,) = tmp_path.glob(f".killed_{parent}*/teacher.npy")
        lessons[parent] = kept.read_bytes()
        kept.unlink()
    assert lessons["learnt"] == lessons["still"]
    succeed(*distilling("learnt", "out"))
    assert "resuming from checkpoint-3" in succeed(*distilling("learnt", "killed_learnt"))
    found = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "killed_learnt")]
    assert found[0].read_bytes() == found[1].read_bytes()


def test_two_processes_are_taught_what_one_is(distilling, tmp_path):
    shared = ["--set", "instruction.batch_size=2", "--set", "instruction.gradient_accumulation=2"]
    # In full precision: sums of gradients in another order are other numbers in bfloat16.
    shared += ["--set", "instruction.quantization=none", "--set", "model.compute_dtype=float32"]
    succeed(*distilling("learnt", "one"), *shared)
    result = launch(*distilling("learnt", "two"), *shared, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    logged = [losses(tmp_path / name) for name in ("one", "two")]
    alone, together = ({(step, key): loss for step, key, loss in own} for own in logged)
    assert together == pytest.approx(alone, rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"final_logit_softcapping": 30.0}, "not one linear layer"), ({}, None)],
)
def test_a_head_that_does_more_is_refused_before_the_work(tiny_phi, change, message):
    from transformers import AutoConfig

    architecture = AutoConfig.from_pretrained(tiny_phi)
    architecture.update(change)
    rows = rows_of(batch((11, 12)), [True, False])
    stage = SimpleNamespace(architecture=architecture)
    if message is None:
        teacher.require_possible(stage, rows)
        return
    with pytest.raises(UserError, match=message):
        teacher.require_possible(stage, rows)
    teacher.require_possible(stage, rows_of(batch((11, 12)), [False, False]))


def test_a_run_that_shares_the_head_out_is_refused_before_the_work(tiny_phi, monkeypatch):
    from transformers import AutoConfig

    stage = SimpleNamespace(architecture=AutoConfig.from_pretrained(tiny_phi))
    monkeypatch.setattr(teacher.distributed, "uses_fsdp", lambda: True)
    with pytest.raises(UserError, match="under FSDP"):
        teacher.require_possible(stage, rows_of(batch((11, 12)), [True, False]))
