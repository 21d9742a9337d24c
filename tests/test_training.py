"""What the trainers compute, against the plain way."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import ROOT

from liteguard import models
from liteguard.config import build, read_yaml
from liteguard.rows import balanced
from liteguard.training import callbacks, feed, loss_head, patches, tokens

# What the SFT and the DPO trainer read of TRL's head, besides the loss.
FIELDS = ("log_probs", "entropy", "is_top1", "mean_logits")


@pytest.fixture
def trainer(tiny_phi):
    """As much of a TRL trainer as `score_targets_only` looks at, with TRL's own head in place."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    values = {"model": {"path": str(tiny_phi)}, "domain": {"lora_rank": 4}}
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)])
    base = models.load_base(config, str(tiny_phi), None, torch.float32, quantize=False)
    torch.manual_seed(0)
    model = models.add_adapter(base, config)
    add_fused_lm_head(model.get_base_model(), outputs=FIELDS)
    return SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))


def batch():
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 500, (3, 12), generator=generator)
    labels = ids.clone()
    for row, prompt in enumerate((4, 7, 2)):
        labels[row, :prompt] = -100
    mask = torch.ones_like(ids)
    mask[2, 9:], labels[2, 9:] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(trainer, inputs):
    outputs = trainer.model(**inputs, fused_lm_head=True)
    outputs.loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad(set_to_none=True)
    return outputs, gradients


@pytest.mark.parametrize("tile", [2048, 100, 7])
def test_logits_at_targets_only_give_trls_loss_and_gradients(trainer, tile, monkeypatch):
    import torch

    inputs = batch()
    theirs, their_gradients = run(trainer, inputs)
    sizes = []
    linear = torch.nn.functional.linear
    first = trainer.model.get_output_embeddings().weight.data_ptr()

    def recorded(rows, weight, bias=None):
        # A tile of the head's matrix lies within it.
        if 0 <= weight.data_ptr() - first < 640 * 64 * 4:
            sizes.append((len(rows), len(weight)))
        return linear(rows, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", recorded)
    monkeypatch.setattr(loss_head, "TILE", tile)
    assert patches.score_targets_only(trainer)
    ours, our_gradients = run(trainer, inputs)
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    assert {rows for rows, _ in sizes} == {supervised}
    assert sum(width for _, width in sizes) == 640 and max(sizes)[1] <= tile
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    for name in FIELDS:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.label_mask, theirs.label_mask)
    assert our_gradients.keys() == their_gradients.keys() and our_gradients
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-6)


def test_generation_and_plain_forward_keep_their_logits(trainer):
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    before = trainer.model(**inputs).logits
    patches.score_targets_only(trainer)
    assert before.equal(trainer.model(**inputs).logits)


def test_a_head_with_more_than_a_linear_layer_is_left_to_trl(trainer):
    trainer.model.get_base_model().config.logit_scale = 0.5
    assert not patches.score_targets_only(trainer)


def test_kinds_take_turns_by_their_weights():
    rows = [{"kind": kind, "n": n} for kind in ("a", "b", "c") for n in range(20)]
    equal = balanced(rows, "kind", 9)
    assert [r["kind"] for r in equal] == ["a", "b", "c"] * 3
    assert [r["n"] for r in equal] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    weighted = balanced(rows, "kind", 20, {"a": 2, "b": 1, "c": 1})
    assert [sum(r["kind"] == kind for r in weighted) for kind in "abc"] == [10, 5, 5]
    everything = balanced(rows, "kind", 60, {"a": 9})
    assert len(everything) == 60 and len({(r["kind"], r["n"]) for r in everything}) == 60


@pytest.mark.parametrize("name", ["phi-2", "phi-1_5"])
def test_phis_stage_3_takes_the_hubs_pairs_by_their_prepared_share(name):
    """A tenth of what the guide's set and the catalogue have, and as many pairs as a run takes."""
    section = build([("phi", read_yaml(ROOT / f"configs/{name}.yaml"))]).safety
    made = {("unknown", "preference"): 13_300, ("harmful", "safety_catalogue"): 480}
    made |= {("borderline", "safety_catalogue"): 434, ("ordinary", "safety_catalogue"): 241}
    rows = [
        {"kind": k, "dataset": d, "n": n} for (k, d), count in made.items() for n in range(count)
    ]
    weights, needed = tokens.kind_weights(section, rows), feed.needed_rows(section)
    used = balanced(rows, "kind", needed, weights)
    counts = Counter(row["kind"] for row in used)
    assert len(used) == 1600
    for (kind, _), count in made.items():
        assert counts[kind] / 1600 == pytest.approx(count / len(rows), abs=1e-3)
    assert all(Counter(row["kind"] for row in used[:400])[kind] > 0 for kind in counts)
    titles = {"preference": "Julian2002/Medical-ChatBot-DPO", "safety_catalogue": "catalogue"}
    text = tokens.mixture(used, rows, titles)
    assert text.startswith("unknown 1,472 (92%), harmful 53 (3%)")
    assert "sources: Julian2002/Medical-ChatBot-DPO 92% (1,472 of its 13,300), catalogue 8%" in text
    # By numbers, as the embedded default names its kinds.
    numbers = section.model_copy(update={"kind_weights": {"harmful": 2}})
    assert tokens.kind_weights(numbers, rows) == {"harmful": 2}


def test_evaluations_without_improvement_are_counted_from_the_log():
    history = [{"loss": 3.0}, *({"eval_loss": loss} for loss in (2.0, 1.5, 1.5, 1.7))]
    assert callbacks.evaluations_since_best(history) == 2
    assert callbacks.evaluations_since_best(history[:3]) == 0
    assert callbacks.evaluations_since_best([]) == 0
    for patience, stopped in ((2, True), (3, False), (0, False)):
        section = SimpleNamespace(early_stopping_patience=patience)
        assert callbacks.stopped_early(section, history) is stopped
    # 0.1 is beta: 31 nats of 30 are lost, so the run was stopped by the guard.
    section = SimpleNamespace(early_stopping_patience=0, chosen_drop_limit=30.0, beta=0.1)
    lost = [*history, {"eval_loss": 0.1, "eval_rewards/chosen": -3.1}]
    assert callbacks.stopped_early(section, lost)
    assert not callbacks.stopped_early(section, [*lost, {"eval_loss": 0.1}])


def test_a_process_does_not_report_its_parents_peak():
    """`getrusage` in a new process goes on with the peak of the one that started it."""
    ballast = bytearray(1_500_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    code = "from liteguard.machine import peak_rss_gb; print(peak_rss_gb())"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    del ballast
    assert 0.01 < float(found.stdout) < 1.2
