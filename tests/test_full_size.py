"""The real-size benchmark, on a small shape: its model has something to say, its YAML is valid."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from conftest import CACHE, ROOT

from liteguard.config import build, read_yaml
from liteguard.evaluation.answerers import Checkpoint
from liteguard.prompts import Prompt

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize("shape", ["phi2", "phi1_5", "smollm2", "tiny"])
def test_every_shape_has_a_valid_configuration(shape, tmp_path):
    import full_size

    args = SimpleNamespace(shape=shape, steps=2, tokens=192, cache_dir=".cache")
    loaded = build([("full size", read_yaml(full_size.write_config(args, tmp_path)))])
    # Few steps; what the proof asks for is what the shape's own YAML says.
    assert loaded.domain.max_steps == 2 and loaded.safety.max_length == 192
    shipped = read_yaml(ROOT / f"configs/{full_size.YAML[shape]}.yaml")
    own = build([("shipped", shipped)])
    assert loaded.compress.verify == own.compress.verify


def test_a_random_model_with_a_sentence_says_it_and_stops(tmp_path):
    import full_size
    import phi_like
    from bench_convert import architecture

    phi_like.write_tokenizer(tmp_path, CACHE)
    phi_like.write_checkpoint(architecture("tiny"), tmp_path, sentence=full_size.SENTENCE)
    model = Checkpoint.merged(tmp_path, Prompt())
    questions = [Prompt().render_question(q) for q in ("What helps?", "Is it dangerous?")]
    for _, answer in model.generate(questions, 24):
        assert answer.text == full_size.SENTENCE and answer.stopped
