"""What answers take of the memory: keys and values of long questions, on a CPU and on a GPU."""

from __future__ import annotations

import pytest
from conftest import ROOT

from liteguard import memory, merged, models
from liteguard.config import EvaluateSection, build, read_yaml
from liteguard.evaluation import answerers, held_out, run
from liteguard.evaluation.answerers import LOGITS_PER_BATCH, cache_bytes, grouped, row_tokens
from liteguard.export import tflite

SECTION = EvaluateSection()
ROOM = SECTION.batch_size * row_tokens(SECTION)
PHI = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml"))])


def test_long_prompts_share_a_batch_with_fewer():
    lengths = [1000 + SECTION.max_new_tokens] * 16
    batches = grouped(lengths, SECTION.batch_size, ROOM)
    assert sorted(place for batch in batches for place in batch) == list(range(16))
    padded = [len(batch) * max(lengths[place] for place in batch) for batch in batches]
    assert max(padded) <= ROOM and len(batches) == 4
    assert grouped([158] * 16, 16, ROOM) == [list(range(16))], "as ever where they are short"
    assert grouped([5, 10_000, 6], 16, ROOM) == [[1], [2, 0]], "the longest first, one at least"
    assert grouped([], 16, ROOM) == []


def test_what_is_said_counts_full_batches_and_the_longest_row():
    phi = memory.phi_architecture("phi-2")
    token = cache_bytes(phi)
    assert token == 32 * 2 * 2560 * 4
    room = PHI.evaluate.batch_size * row_tokens(PHI.evaluate)
    said = [answerers.expected_memory(PHI, phi, None, longest)[0] for longest in (0, room, 20_000)]
    full = max(map(len, grouped([1160] * 16, 16, room))) * 1160 * token
    assert said[0] == said[1] > 2 * models.count_parameters(phi) + full
    assert said[2] - said[1] == (20_000 - room) * token


@pytest.mark.parametrize("name", ["phi-1_5", "phi-2"])
def test_the_proofs_own_answers_fit_where_the_conversion_does(name):
    """That is what is checked before the work (`tflite.require_resources`)."""
    phi = memory.phi_architecture(name)
    parameters = models.count_parameters(phi)
    needed = merged.measuring_memory(parameters, ROOM * cache_bytes(phi), 4 * LOGITS_PER_BATCH)
    assert needed < tflite.required_resources(parameters, "v2")[0]


def test_the_longest_row_is_an_answer_or_a_question_with_its_options():
    rows = {n: [] for n in ("texts", "knowledge", *held_out.TIERS, *held_out.REQUESTS)}
    rows["questions"] = [{"prompt": "word " * 700, "completion": "yes"}]
    asked = len(PHI.prompt.render_row(rows["questions"][0]).split())

    def longest() -> int:
        return run.longest_row(PHI, rows, lambda text: len(text.split()))

    assert longest() == asked + PHI.evaluate.max_new_tokens
    options = ["one", "two words", "three", "four"]
    rows["knowledge"] = [{"context": "word " * 400, "prompt": "Why?", "options": options}]
    context = 1 + 400 + 3
    assert longest() == 4 * (context + 2)
