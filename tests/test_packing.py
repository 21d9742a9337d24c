"""Packed micro-batches: the loss and gradients of padded rows, and nothing seen of a neighbour."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

from liteguard import models
from liteguard.config import build, read_yaml
from liteguard.errors import UserError
from liteguard.training import feed, isolation, micro_batch, packing, patches
from liteguard.training.tokens import TokenRows

ATTENTIONS = ("sdpa", "eager")


def adapted(directory, attention: str):
    """The tiny Phi in float32 with a random adapter and our head, not packed yet."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    values = {"model": {"path": str(directory), "attention": attention}, "domain": {"lora_rank": 4}}
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("t", values)])
    base = models.load_base(config, str(directory), None, torch.float32, quantize=False)
    torch.manual_seed(0)
    model = models.add_adapter(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    add_fused_lm_head(model.get_base_model(), outputs=("log_probs", "entropy", "is_top1"))
    patches.score_targets_only(
        SimpleNamespace(model=model, accelerator=SimpleNamespace(unwrap_model=lambda m: m))
    )
    return model


def packed(model):
    if model.config._attn_implementation == "sdpa":
        packing.use_segment_attention(model.get_base_model())
    packing.pack_forward(model.get_base_model())
    return model


def batch(lengths=(5, 12, 1, 9), seed=1):
    """Padded rows of random ids; the first third of each is a prompt."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 500, (len(lengths), max(lengths)), generator=generator)
    labels, mask = ids.clone(), torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
        labels[row, : length // 3] = -100
        labels[row, length:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run(model, inputs):
    outputs = model(**inputs, fused_lm_head=True)
    outputs.log_probs.sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return outputs, gradients


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_give_the_padded_rows_results_and_gradients(tiny_phi, attention, checkpointing):
    import torch

    model = adapted(tiny_phi, attention)
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    inputs = batch()
    theirs, their_gradients = run(model, inputs)
    seen = []
    model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ours, our_gradients = run(packed(model), inputs)
    tokens = 5 + 12 + 1 + 9
    filled = -tokens % packing.CPU_LENGTHS if attention == "sdpa" else 0
    assert seen == [(1, tokens + filled)], "padding was computed"
    for name in ("log_probs", "entropy", "is_top1", "label_mask"):
        mine, plain = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine.float(), plain.float(), rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == their_gradients.keys() and our_gradients
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_example_never_sees_its_neighbour(tiny_phi, attention):
    model = adapted(tiny_phi, attention)
    isolation.pack(model, model.config, 96)
    first, second = batch((11, 12)), batch((11, 12))
    second["input_ids"][0] = batch((11, 12), seed=2)["input_ids"][0]
    outputs = [model(**inputs, fused_lm_head=True).log_probs for inputs in (first, second)]
    assert not outputs[0][0].equal(outputs[1][0])
    assert outputs[0][1].equal(outputs[1][1]), "the second example changed with the first"


def test_few_lengths_are_computed_and_what_fills_them_is_not_learned(tiny_phi):
    """The C library's search for memory grows with the number of sizes it has handed out."""
    import torch

    model = packed(adapted(tiny_phi, "sdpa"))
    seen = []
    model.get_base_model().base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    embeddings = model.get_input_embeddings().weight.requires_grad_()
    for lengths in [(9, 12), (30, 2), (33,), (20, 20, 30)]:
        inputs = batch(lengths)
        outputs = model(**inputs, fused_lm_head=True)
        scored = -outputs.log_probs.sum() / outputs.label_mask.sum()
        torch.testing.assert_close(outputs.loss, scored, msg="the filling is scored")
        outputs.log_probs.sum().backward()
        own = inputs["input_ids"][inputs["attention_mask"].bool()].unique()
        learned = embeddings.grad.abs().sum(1).nonzero()[:, 0]
        assert torch.isin(learned, own).all(), "the filling has a gradient"
        model.zero_grad(set_to_none=True)
    assert [ids.shape[1] for ids in seen] == [32, 32, 64, 96]


def test_attention_that_crosses_examples_is_refused(tiny_phi, monkeypatch):
    """One causal attention over the whole micro-batch, which many packing recipes use."""

    def crossing(module, query, key, value, mask, scaling=None, segment_lengths=None, **kwargs):
        return original(
            module, query, key, value, mask, scaling, segment_lengths=[query.shape[2]], **kwargs
        )

    original = packing.segment_attention
    monkeypatch.setattr(packing, "segment_attention", crossing)
    model = adapted(tiny_phi, "sdpa")
    with pytest.raises(isolation.PackingRefused, match=r"packing is refused.*neighbour"):
        isolation.pack(model, model.config, 96)


def test_generation_still_sees_the_whole_prompt(tiny_phi):
    import torch

    model = adapted(tiny_phi, "sdpa")
    model.eval()
    ids = batch((9,))["input_ids"]
    with torch.no_grad():
        before = copy.deepcopy(model)(input_ids=ids).logits
        after = packed(model)(input_ids=ids).logits
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_a_batch_whose_loss_is_not_finite_is_handed_over(tiny_phi):
    import torch

    model, kept = packed(adapted(tiny_phi, "sdpa")), []
    packing.watch_losses(model.get_base_model(), kept.append)
    inputs = batch()
    model(**inputs, fused_lm_head=True)
    assert not kept
    broken = (p for n, p in model.named_parameters() if "fc2.lora_B" in n)
    next(broken).data.fill_(torch.nan)
    with torch.no_grad():
        model(**inputs, fused_lm_head=True)
    assert not kept, "an evaluation is not training"
    model(**inputs, fused_lm_head=True)
    [found] = kept
    assert all(found[name].equal(inputs[name]) for name in inputs) and len(found) == len(inputs)


def rows_of(lengths, prompts=None) -> TokenRows:
    ends = np.cumsum(lengths)
    prompts = np.zeros(len(lengths), np.int64) if prompts is None else np.array(prompts)
    ids = np.arange(1, ends[-1] + 1, dtype=np.uint32)
    return TokenRows(ids, ends - np.array(lengths), ends, prompts)


def test_every_row_of_a_step_is_in_one_of_its_micro_batches():
    lengths = np.random.default_rng(0).integers(1, 300, 500)
    steps = micro_batch.steps_of_rows(micro_batch.repeat_order(500, 0, False), 16, 40)
    for capacity, multiple in ((512, 1), (2048, 1), (512, 2), (100_000, 4)):
        batches, count = micro_batch.micro_batches(steps, lengths, capacity, multiple)
        assert len(batches) == count * len(steps) and count % multiple == 0
        for number, step in enumerate(steps):
            own = batches[number * count : (number + 1) * count]
            assert sorted(sum(own, [])) == sorted(step) and all(own)
            assert max(lengths[group].sum() for group in own) <= capacity
        if count > multiple:
            smaller = count - multiple
            groups = [micro_batch.spread([lengths[r] for r in step], smaller) for step in steps]
            loads = [
                sum(lengths[step[i]] for i in group)
                for step, found in zip(steps, groups, strict=True)
                for group in found
            ]
            assert max(loads) > capacity, "fewer micro-batches would have done"
    with pytest.raises(UserError, match="cannot be spread over 32"):
        micro_batch.micro_batches(steps, lengths, 100_000, 32)


def test_passes_over_the_rows_are_complete_and_repeatable():
    def order(seed):
        found = micro_batch.repeat_order(10, seed, shuffle_first=False)
        return [next(found) for _ in range(30)]

    first = order(0)
    assert first[:10] == list(range(10)), "preparation's mixture is read from the front"
    assert all(sorted(first[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert first[10:20] != first[20:30] and order(0) == first != order(1)


def test_steps_of_tokens_fill_the_budget_and_cut_nothing():
    lengths = np.random.default_rng(1).integers(1, 128, 300)
    steps = micro_batch.steps_of_tokens(micro_batch.repeat_order(300, 0, True), lengths, 1024, 30)
    totals = [lengths[step].sum() for step in steps]
    assert max(totals) <= 1024 and min(totals) > 1024 - 128
    assert sum(steps, []) == [
        row for row, _ in zip(micro_batch.repeat_order(300, 0, True), sum(steps, []), strict=False)
    ]


def test_long_texts_fit_one_row_a_micro_batch():
    """Articles cut into pieces of 2,048 tokens, one piece a micro-batch (the 8 GB settings)."""
    generator = np.random.default_rng(0)
    lengths = []
    for article in generator.integers(500, 4500, 400):
        lengths += [2048] * (article // 2048) + [article % 2048 or 2048]
    lengths = np.array(lengths)
    order = micro_batch.repeat_order(len(lengths), 0, shuffle_first=True)
    steps = micro_batch.steps_of_tokens(order, lengths, 16 * 2048, 200)
    with pytest.raises(UserError, match="cannot be spread"):
        micro_batch.micro_batches(steps, lengths, 2048)
    order = micro_batch.repeat_order(len(lengths), 0, shuffle_first=True)
    steps = micro_batch.steps_of_groups(order, lengths, 2048, 16, 200)
    batches, count = micro_batch.micro_batches(steps, lengths, 2048)
    assert count == 16 and len(batches) == 16 * 200
    assert max(lengths[batch].sum() for batch in batches) <= 2048
    # Nothing is left out: the steps hold the rows of the order, one after the other.
    order = micro_batch.repeat_order(len(lengths), 0, shuffle_first=True)
    assert [row for step in steps for row in step] == [
        next(order) for _ in range(sum(map(len, steps)))
    ]
    filled = sum(lengths[step].sum() for step in steps) / (200 * 16 * 2048)
    assert filled > 0.85


def test_collator_masks_prompts_and_padding():
    rows = rows_of([4, 6], prompts=[2, 1])
    found = packing.Collator({"train": rows}, pad_id=99)([{"part": "train", "rows": [0, 1]}])
    assert found["input_ids"].tolist() == [[1, 2, 3, 4, 99, 99], [5, 6, 7, 8, 9, 10]]
    assert found["labels"].tolist() == [[-100, -100, 3, 4, -100, -100], [-100, 6, 7, 8, 9, 10]]
    assert found["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert rows.supervised.tolist() == [2, 5]


def test_row_weights_are_those_of_the_formula():
    supervised, steps = np.array([1, 4, 9]), [[0, 1], [1, 2]]
    token, square, sample = (
        micro_batch.row_weights(steps, supervised, name) for name in ("token", "square", "sample")
    )
    assert [w.tolist() for w in token] == [[1, 1], [1, 1]]
    # 5 tokens: the loss 5 (1 l + 1/4 (l1 + .. + l4)) / 2 over 5 is the mean of two rows' means.
    assert sample[0].tolist() == [2.5, 0.625]
    # 13 tokens; the rows count sqrt(4) and sqrt(9) times.
    assert square[1] == pytest.approx([13 / 2 / 5, 13 / 3 / 5])


@pytest.mark.parametrize(
    ("capacity", "processes"), [(512, 1), (512, 2), (2048, 1), (2048, 2), (8192, 1)]
)
def test_padded_texts_are_spread_within_the_same_memory(capacity, processes):
    """Whatever number of texts a step holds, also of micro-batches that hold one long one each."""
    lengths = np.random.default_rng(3).integers(40, 512, 400)
    order = micro_batch.repeat_order(len(lengths), 0, shuffle_first=True)
    planned = micro_batch.steps_of_tokens(order, lengths, 8 * 1024, 30)
    assert len({len(step) for step in planned}) > 3
    shape = {"batch_size": capacity // 512, "gradient_accumulation": 8 * 1024 // capacity}
    section = SimpleNamespace(packing=False, max_length=512, max_steps=30, seed=0, **shape)
    config = SimpleNamespace(model=SimpleNamespace(context_length=2048))
    stage = SimpleNamespace(name="domain", section=section, config=config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed.distributed, "world_size", lambda: processes)
        steps, batches, count = feed.spread_steps(stage, lengths, planned)
    assert count % processes == 0 and len(batches) == 30 * count and all(batches)
    assert max(len(b) * lengths[b].max() for b in batches) <= capacity
    for number, step in enumerate(steps):
        own = batches[number * count : (number + 1) * count]
        assert sorted(row for batch in own for row in batch) == sorted(step)


@pytest.mark.parametrize("reduction", micro_batch.LOSS_REDUCTIONS)
def test_a_weighted_step_has_the_loss_and_gradient_of_its_definition(tiny_phi, reduction):
    """Micro-batch by micro-batch, divided by the tokens of the step as trainers do it."""
    import torch

    model = packed(adapted(tiny_phi, "sdpa"))
    packing.weigh_rows(model.get_base_model())
    lengths = np.array([5, 12, 4, 9])
    rows = rows_of(lengths, prompts=lengths // 3)
    weights = micro_batch.row_weights([[0, 1, 2, 3]], rows.supervised, reduction)[0]
    collate = packing.Collator({"train": rows}, pad_id=0)
    everything = rows.supervised.sum()

    def gradients():
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    loss = 0.0
    for own in ([1], [0, 3], [2]):
        item = {"part": "train", "rows": own, "weights": [weights[row] for row in own]}
        part = -model(**collate([item]), fused_lm_head=True).log_probs.sum() / everything
        part.backward()
        loss += part.item()
    found = gradients()

    means = []
    for row in range(4):
        outputs = model(**collate([{"part": "train", "rows": [row]}]), fused_lm_head=True)
        means.append(-outputs.log_probs.sum() / rows.supervised[row])
    times = torch.tensor(rows.supervised).float()
    times **= {"token": 1, "square": 0.5, "sample": 0}[reduction]
    expected = (torch.stack(means) * times).sum() / times.sum()
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    for mine, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def embedded(model, inputs):
    """What the embedding gives the first layer in a forward pass, row by row without padding."""
    found = []
    handle = model.get_input_embeddings().register_forward_hook(lambda m, a, out: found.append(out))
    model(**inputs, fused_lm_head=True)
    handle.remove()
    [rows] = found
    keep = inputs["attention_mask"].bool()
    flat = rows[0, : keep.sum()] if rows.shape[0] == 1 else rows[keep]
    return flat.detach().split(keep.sum(1).tolist())


@pytest.mark.parametrize("pack", [False, True])
def test_noise_is_that_of_a_row_alone(tiny_phi, pack):
    """Its bound is alpha / sqrt(tokens x hidden size), of the row and not of the batch."""
    import torch

    model = adapted(tiny_phi, "sdpa")
    model = packed(model) if pack else model
    inputs = batch((40, 7, 90))
    model.train()
    plain = embedded(model, inputs)
    packing.add_noise(model.get_base_model(), 5.0)
    noisy = embedded(model, inputs)
    for clean, dirty in zip(plain, noisy, strict=True):
        bound = 5 / (len(clean) * 64) ** 0.5
        noise = (dirty - clean).abs()
        assert 0.95 * bound < noise.max() <= bound * 1.0001
        assert noise.mean() == pytest.approx(bound / 2, rel=0.15)
    assert not noisy[0].equal(embedded(model, inputs)[0]), "the same noise again"
    # What is measured has none.
    with torch.no_grad():
        assert embedded(model, inputs)[2].equal(plain[2])
    model.eval()
    assert embedded(model, inputs)[0].equal(plain[0])
