"""The GPU benchmark, on the CPU: it runs, and all recipes train on the same thing."""

from __future__ import annotations

import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, fail, succeed

from liteguard.config import build, read_yaml
from liteguard.training import packing
from liteguard.training.memory_terms import read_shapes

SCRIPT = ROOT / "benchmarks/gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu_check") / "report.json"
    flags = {"--shape": "tiny", "--device": "cpu", "--rows": 6, "--steps": 1, "--length": 48}
    words = [str(word) for pair in flags.items() for word in pair]
    text = succeed(SCRIPT, *words, "--json", path)
    return text, json.loads(path.read_text())


def test_every_stage_and_recipe_is_in_table_and_report(report):
    text, found = report
    rows = found["rows"]
    assert [(r["stage"], r["recipe"]) for r in rows] == [
        (stage, recipe)
        for stage in ("domain", "instruction", "safety")
        for recipe in ("ours", "trl", "plain")
    ]
    for other in ("trl", "plain"):
        assert all(r[f"speed_over_{other}"] > 0 for r in rows if r["recipe"] == "ours")
    # Goals are a GPU's: a tiny model on a CPU cannot reach them.
    assert found["misses"] == []
    assert found["matmul_flops"] > 1e9
    for row in rows:
        assert 0 < row["mfu"] < 1 and row["peak_bytes"] > 0 and row["seconds"] > 0
        assert row["supervised_tokens"] <= row["tokens"]
        assert f"{row['tokens_per_s']:,.0f}" in text
        assert all(map(math.isfinite, row["losses"]))


def test_every_path_has_a_verdict(report):
    paths = report[1]["paths"]
    assert set(paths) == {
        *("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"),
        *("sdpa", "eager", "flash_attention_2", "paged 8-bit AdamW"),
    }
    assert paths["FLASH_ATTENTION"].startswith("agrees") and paths["MATH"].startswith("agrees")
    assert paths["sdpa"] == paths["eager"] == "isolated"
    assert "not available" in paths["paged 8-bit AdamW"]


def test_a_path_that_mixes_examples_is_refused(gpu_check, monkeypatch):
    original = packing.segment_attention

    def crossing(*args, segment_lengths=None, **kwargs):
        whole = None if segment_lengths is None else [sum(segment_lengths)]
        return original(*args, segment_lengths=whole, **kwargs)

    monkeypatch.setattr(packing, "segment_attention", crossing)
    assert gpu_check.attention_paths("cpu")["sdpa"].startswith("REFUSED (packing is refused")


def test_missed_goals_are_named(gpu_check):
    def row(stage, gb, plain, trl):
        return {
            **{"shape": "phi-2", "recipe": "ours", "stage": stage, "peak_bytes": gb * 1e9},
            **{"speed_over_plain": plain, "speed_over_trl": trl},
        }

    good = [row("domain", 5.4, 3.1, 1.4), row("instruction", 5, 4, 2), row("safety", 6.9, 3, 1.3)]
    report = {"rows": good, "paths": {"sdpa": "isolated", "b": "not available"}, "wall_s": 599}
    assert gpu_check.misses(report) == []
    bad = [row("domain", 5.6, 2.9, 1.2), row("safety", 7.1, 3, 1.3)]
    bad.append({**row("domain", 50, 1, 1), "shape": "phi-1_5"})
    paths = {"sdpa": "REFUSED (neighbour)"}
    found = gpu_check.misses({"rows": bad, "paths": paths, "wall_s": 660})
    assert found == [
        "sdpa: REFUSED (neighbour)",
        "phi-2 domain: peak 5.60 GB, goal 5.5 GB",
        "phi-2 domain: 2.90 x the speed of plain, goal 3.0 x",
        "phi-2 domain: 1.20 x the speed of trl, goal 1.3 x",
        "phi-2 safety: peak 7.10 GB, goal 7.0 GB",
        "11.0 minutes in all, goal 10",
    ]


def test_trl_packs_only_where_examples_stay_apart(gpu_check, monkeypatch):
    """Its collator passes positions; that they become a block-diagonal mask is transformers'."""
    from transformers import masking_utils

    base = gpu_check.random_base(gpu_check.architecture("tiny"), torch.float32, "cpu")
    assert gpu_check.trl_recipe.isolated(base)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda positions: None)
    assert not gpu_check.trl_recipe.isolated(base)


def test_all_recipes_start_from_the_same_loss(report):
    rows = {(r["stage"], r["recipe"]): r["losses"] for r in report[1]["rows"]}
    ours, plain = rows["domain", "ours"], rows["domain", "plain"]
    # Domain rows are equally long: the mean over tokens is that over batches, step after step.
    assert ours == pytest.approx(plain, rel=1e-3)
    assert ours == pytest.approx(rows["domain", "trl"], rel=1e-3)
    assert rows["instruction", "ours"][0] == pytest.approx(
        rows["instruction", "plain"][0], rel=0.02
    )
    # Both take the mean over the tokens of a step.
    assert rows["instruction", "ours"][0] == pytest.approx(rows["instruction", "trl"][0], rel=1e-3)
    for recipe in ("ours", "trl", "plain"):
        assert rows["safety", recipe][0] == pytest.approx(math.log(2), abs=1e-4)


def test_without_a_gpu_it_says_what_to_run(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("has a GPU")
    assert "--shape tiny --device cpu" in fail(2, SCRIPT)


def test_random_base_is_nf4_of_the_exact_shape(gpu_check):
    import bitsandbytes

    config = gpu_check.architecture("tiny")
    base = gpu_check.random_base(config, torch.float32, "cpu")
    assert not any(p.is_meta for p in (*base.parameters(), *base.buffers()))
    quantised = [m for m in base.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(quantised) == 12 and all(m.weight.quant_state.nested for m in quantised)
    shapes = read_shapes(config)
    assert sum(math.prod(m.weight.quant_state.shape) for m in quantised) == shapes.linear_parameters
    assert type(base.lm_head) is torch.nn.Linear


def test_flops_by_hand(gpu_check):
    shapes = read_shapes(gpu_check.architecture("tiny"))
    row = {"input_ids": [1] * 10, "labels": [-100] * 4 + [1] * 6}
    linear = 2 * (4 * 64 * 64 + 2 * 64 * 128)
    attention = 2 * 2 * 10**2 * 64
    head = 2 * 64 * 640 * 6
    by_hand = 3 * attention + 2 * head + 10 * (4 * linear + 6 * 100)
    assert gpu_check.model_flops(shapes, 100, "domain", [row]) == by_hand
    reference = attention + head + 10 * 2 * (linear + 100)
    assert gpu_check.model_flops(shapes, 100, "safety", [row]) == by_hand + reference


def test_the_plain_recipe_gives_up_memory_step_by_step(gpu_check, monkeypatch):
    config = build(
        [
            ("phi-2", read_yaml(ROOT / "configs/phi-2_8gb.yaml")),
            ("test", {"domain": {"batch_size": 1, "max_length": 16}}),
        ]
    )
    base = gpu_check.random_base(gpu_check.architecture("tiny"), torch.float32, "cpu")
    arithmetic = SimpleNamespace(
        device="cpu", autocast=lambda: torch.autocast("cpu", enabled=False)
    )
    plain = gpu_check.Plain("domain", config, base, arithmetic)
    real, tried = plain.attempt, []

    def attempt(rows, batch_size):
        tried.append((batch_size, base.is_gradient_checkpointing))
        if batch_size > 2:
            raise torch.OutOfMemoryError("full")
        return real(rows, batch_size)

    monkeypatch.setattr(plain, "attempt", attempt)
    rows = [[row] for row in gpu_check.make_rows("domain", 4, 16, 600)]
    assert math.isfinite(plain.step(rows)) and math.isfinite(plain.step(rows))
    assert tried == [(4, False), (4, True), (2, True), (2, True)]
    assert "micro-batch 2, checkpointing" in plain.note
