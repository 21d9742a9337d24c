"""The training benchmark's own rows are prepared data that the three stages take."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

from conftest import ROOT

from liteguard.rows import load_split, read_manifest


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_rows_are_read_as_prepared_data(tmp_path):
    bench = script("bench_training")
    bench.write_rows([" ".join(map(str, range(900)))], tmp_path, count=40)
    counts = read_manifest(tmp_path)["counts"]
    for part in bench.PARENTS:
        name = "preference" if part == "safety" else part
        rows = load_split(tmp_path, name, "train")
        found = counts[f"{name}/train.jsonl"]
        assert len(rows) == found["rows"] == 40
        if "completion" in rows[0]:
            longest = max(len(f"{row['prompt']} {row['completion']}".split()) for row in rows)
            assert bench.LONGEST // 2 < longest <= bench.LONGEST
        assert sum(len(v.split()) for row in rows for v in row.values()) == found["words"]


def test_stage_3_takes_its_pairs_on_both_sides(tmp_path, monkeypatch):
    """They have no kinds: the base's YAML weighs kinds, and the benchmark's own must not."""
    from liteguard.config import build, read_yaml
    from liteguard.embedded import diseases
    from liteguard.training import tokens

    bench, recipe = script("bench_training"), script("trl_recipe")
    text = " ".join(map(str, range(900)))
    monkeypatch.setattr(diseases, "mondo_text", lambda *_: [{"text": text}])
    sizes = {"steps": 2, "batch_size": 4, "gradient_accumulation": 1}
    args = SimpleNamespace(**sizes, stage="safety", cache_dir=tmp_path, data=tmp_path / "data")
    path = bench.prepare(args, tmp_path)
    settings = build([("bench", read_yaml(path)), ("t", {"safety": {"max_length": 1000}})])
    pairs = load_split(args.data, "preference", "train")
    assert tokens.kind_weights(settings.safety, pairs) == {"None": 8}

    def tokenizer(text: str, add_special_tokens: bool) -> dict:
        return {"input_ids": text.split()}

    found = recipe.dataset(args, settings, tokenizer)
    assert found.column_names == ["prompt", "chosen", "rejected"] and len(found) == 8
    assert pairs[0]["chosen"] in found[0]["chosen"]
