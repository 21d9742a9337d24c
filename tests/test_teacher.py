"""Distributions as targets: what the parent of stage 2 expects, instead of a row's words."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from conftest import ROOT, succeed
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
def parent(tiny_config, tmp_path_factory):
    """A finished stage 1 of the tiny model."""
    work = tmp_path_factory.mktemp("parent")
    succeed(ROOT / "prepare_datasets.py", "--config", tiny_config, "--output", work / "data")
    command = [ROOT / "train_domain.py", "--config", tiny_config, "--data", work / "data"]
    succeed(*command, "--output", work / "domain")
    return work / "domain"


@pytest.fixture
def distilling(parent, tiny_config, tmp_path):
    """The command of a stage 2 with distilled answers only, and its output."""
    content = yaml.safe_load(tiny_config.read_text())
    content["data"]["instruction"][0]["distill"] = True
    config = tmp_path / "distill.yaml"
    config.write_text(yaml.safe_dump(content))
    data, output = tmp_path / "data", tmp_path / "out"
    succeed(ROOT / "prepare_datasets.py", "--config", config, "--output", data)
    command = [ROOT / "train_instruction.py", "--checkpoint", parent]
    return [*command, "--config", config, "--data", data, "--output", output], output


def test_stage_2_begins_where_its_parent_is(distilling):
    """At the first step the loss is the parent's own entropy, whatever the rows say."""
    command, output = distilling
    succeed(*command)
    log = json.loads((output / "log_history.json").read_text())
    first = next(entry for entry in log if "loss" in entry)
    assert first["loss"] == pytest.approx(first["entropy"], rel=1e-2)  # of bfloat16
    hard = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert all(abs(loss - first["entropy"]) > 0.05 for loss in hard)  # of the words
    assert not list(output.parent.glob(f".{output.name}*/teacher.npy"))


def test_a_resumed_stage_2_has_the_same_teacher(distilling, tmp_path):
    """The parent is asked before the trained adapter is loaded, even where its file is gone."""
    command, output = distilling
    succeed(*command)
    again = [*map(str, command[:-1]), str(output.with_name("again"))]
    kill_at("instruction 4/6", again, tmp_path)
    (kept,) = tmp_path.glob(".again*/teacher.npy")
    kept.unlink()
    assert "resuming from checkpoint-3" in succeed(*again)
    whole, resumed = (tmp_path / name / "adapter_model.safetensors" for name in ("out", "again"))
    assert whole.read_bytes() == resumed.read_bytes()


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
