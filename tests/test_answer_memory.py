"""What answers take of the memory: keys and values of long questions, on a CPU and on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from conftest import ROOT

from liteguard import memory, merged, models
from liteguard.config import EvaluateSection, build, read_yaml
from liteguard.errors import UserError
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


def test_a_gpu_without_room_is_named_before_the_work(monkeypatch):
    """Phi-2's weights are 5.6 GB in 16 bit."""
    import torch

    phi, free = memory.phi_architecture("phi-2"), 4 * 10**9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * 10**9))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with pytest.raises(UserError, match=r"about 6\.\d GB of the GPU's memory, and 4.0 GB is free"):
        answerers.require_gpu_memory(phi, 416)
    free = 7 * 10**9
    answerers.require_gpu_memory(phi, 416)
    with pytest.raises(UserError, match="is free"):
        answerers.require_gpu_memory(phi, 5000)


def test_batches_are_cut_to_what_a_gpu_has_free(monkeypatch):
    import torch

    phi = memory.phi_architecture("phi-2")
    model = SimpleNamespace(device=torch.device("cuda"), config=phi, dtype=torch.bfloat16)
    checkpoint = answerers.Checkpoint.__new__(answerers.Checkpoint)
    checkpoint.model, checkpoint.batch_size, checkpoint.row_tokens = model, 16, 416
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 24 * 10**9))
    free = 10**10
    assert checkpoint._room() == 16 * 416
    free = 2 * 100 * cache_bytes(phi, 2)
    assert checkpoint._room() == 100


def test_memory_that_runs_out_halves_the_batch():
    import torch

    tried: list[list[int]] = []

    def work(batch: list[int]):
        tried.append(batch)
        for number, place in enumerate(batch):
            if number == 1 and len(batch) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield place, f"answer {place}"

    found = list(answerers.in_halves([7, 3, 5, 1, 2], work))
    assert sorted(found) == [(place, f"answer {place}") for place in (1, 2, 3, 5, 7)]
    assert tried == [[7, 3, 5, 1, 2], [3, 5], [1, 2]], "what was done is not done again"

    def never(batch: list[int]):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    with pytest.raises(torch.OutOfMemoryError):
        list(answerers.in_halves([1, 2], never))
