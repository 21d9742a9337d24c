"""The training benchmark's own rows are prepared data that the three stages take."""

from __future__ import annotations

import importlib.util

from conftest import ROOT

from liteguard.rows import load_split, read_manifest

SCRIPT = ROOT / "benchmarks/bench_training.py"


def test_its_rows_are_read_as_prepared_data(tmp_path):
    spec = importlib.util.spec_from_file_location("bench_training", SCRIPT)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
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
