"""Numbers that decide: the same for every way to cut rows into batches, and the formula's."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, diseases

from liteguard import machine, models
from liteguard.config import PREFERENCE_LOSSES, build, read_yaml
from liteguard.training import arguments, callbacks, loop, patches, validation
from liteguard.training.feed import make_feed, pair_counts
from liteguard.training.reference import precompute_reference
from liteguard.training.stage import Run, load_model
from liteguard.training.tokens import TokenRows

# (batch_size, gradient_accumulation) of one optimizer step of eight pairs.
SHAPES = ((4, 2), (1, 8), (8, 1))


def stage_of(name: str, directory, work, **section) -> Run:
    """A stage of the tiny Phi in float32, without the data and the parent that `plan` looks for."""
    from transformers import AutoConfig

    small = {"learning_rate": 1e-3, "max_length": 96, "warmup_steps": 0, "logging_steps": 1}
    values = {
        "model": {"path": str(directory), "quantization": "none", "compute_dtype": "float32"},
        "domain": {"lora_rank": 4},
        name: small | section,
    }
    config = build([("phi", read_yaml(ROOT / "configs/phi-2.yaml")), ("test", values)])
    architecture = AutoConfig.from_pretrained(directory)
    return Run(
        name=name,
        config=config,
        output=work / "out",
        data_dir=work,
        parent=None,
        base_directory=str(directory),
        base_revision=None,
        architecture=architecture,
        inputs={},
        rows={},
        work=work,
    )


def tokenizer_of(stage: Run):
    return models.load_tokenizer(stage.base_directory, stage.config.prompt, 640)


def disturb(model, seed: int = 0) -> None:
    """Give the trained adapter a random second half, so that it does something."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B.default" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


def rows_of(prompts: list[list[int]], answers: list[list[int]]) -> TokenRows:
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    ends = np.cumsum([len(row) for row in rows])
    ids = np.array([token for row in rows for token in row], np.uint32)
    return TokenRows(ids, np.array([0, *ends[:-1]]), ends, np.array([len(p) for p in prompts]))


def sft_trainer(stage: Run, train: TokenRows, held_out: TokenRows):
    from trl import SFTConfig, SFTTrainer

    feed = make_feed(stage, tokenizer_of(stage), train, held_out)
    trainer = SFTTrainer(
        model=load_model(stage),
        args=SFTConfig(**arguments.trainer_arguments(stage) | feed.arguments()),
        train_dataset=feed.train,
        eval_dataset=feed.evaluation,
        data_collator=feed.collator,
        processing_class=tokenizer_of(stage),
        callbacks=callbacks.stage_callbacks(stage),
    )
    return trainer, feed.counts


def dpo_trainer(stage: Run, pairs: list[dict], held_out: list[dict], reference: int = 0):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = load_model(stage)
    disturb(model, reference)
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(
            **arguments.trainer_arguments(stage),
            **arguments.preference_losses(stage.section),
        ),
        train_dataset=Dataset.from_list(pairs),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=tokenizer_of(stage),
        callbacks=callbacks.stage_callbacks(stage),
    )
    return trainer, pair_counts(stage, trainer.train_dataset)


def made_up_pairs(count: int) -> list[dict[str, str]]:
    """Answers of one to forty words, so that a mean of means is far from the mean."""
    words = ["the", "heart", "a", "fever", "of", "an", "injury", "and", "swelling", "its", "bone"]
    generator = np.random.default_rng(3)

    def answer() -> str:
        length = int(generator.choice([1, 3, 40]))
        return " ".join(generator.choice(words, length)) + "<|endoftext|>"

    return [
        {
            "prompt": f"Instruct: What is disease {n}?\nOutput:\n",
            "chosen": answer(),
            "rejected": answer(),
        }
        for n in range(count)
    ]


def plain_logps(model, ids: list[int], prompt: int):
    """Log-probabilities of the tokens after the prompt, from all logits."""
    import torch

    row = torch.tensor(ids)[None]
    with torch.no_grad():
        scores = model(input_ids=row).logits[0, :-1].double().log_softmax(-1)
    return scores.gather(1, row[0, 1:, None])[prompt - 1 :, 0]


@pytest.mark.parametrize("packing", [True, False])
def test_validation_loss_does_not_depend_on_the_batch(tiny_phi, tmp_path, packing):
    lengths = np.array([9, 60, 12, 10, 80, 11, 9, 70, 14, 10, 33])
    prompts = np.array([7, 5, 9, 8, 0, 9, 6, 60, 12, 7, 3])
    ids = np.random.default_rng(1).integers(5, 500, (11, 80)).tolist()
    cut = list(zip(ids, prompts, lengths, strict=True))
    rows = rows_of([row[:p] for row, p, _ in cut], [row[p:n] for row, p, n in cut])
    found = []
    for size in (1, 4, 8):
        shape = {"batch_size": size, "gradient_accumulation": 8 // size, "packing": packing}
        stage = stage_of("instruction", tiny_phi, tmp_path, max_steps=2, **shape)
        trainer, counts = sft_trainer(stage, rows, rows)
        disturb(trainer.model)
        patches.hook_losses(stage, trainer, counts)
        found.append(trainer.evaluate()["eval_loss"])
    each = [
        plain_logps(trainer.model, rows.row(n)[0].tolist(), max(prompts[n], 1)) for n in range(11)
    ]
    everything = [float(value) for row in each for value in row]
    assert len(everything) == rows.supervised.sum()
    assert found == pytest.approx([-np.mean(everything)] * 3, abs=1e-4)
    assert abs(np.mean([float(row.mean()) for row in each]) - np.mean(everything)) > 0.01


@pytest.mark.parametrize("once", [True, False])
def test_validation_of_pairs_does_not_depend_on_the_batch(tiny_phi, tmp_path, once):
    """Nor on whether the reference was scored before; policy and reference differ here."""
    pairs, found = made_up_pairs(11), []
    for size in (1, 4, 8):
        shape = {"batch_size": size, "gradient_accumulation": 8 // size, "sft_weight": 0.5}
        stage = stage_of("safety", tiny_phi, tmp_path, max_steps=1, **shape)
        trainer, counts = dpo_trainer(stage, pairs, pairs)
        patches.hook_losses(stage, trainer, counts)
        if once:
            work = tmp_path / f"once{size}"
            work.mkdir()
            precompute_reference(replace(stage, work=work), trainer)
        disturb(trainer.model, seed=1)
        found.append(trainer.evaluate())
    # The reference again, now as the only adapter.
    policy, reference = trainer.model, load_model(stage)
    disturb(reference)
    losses, rewards, tokens = [], [], []
    for row in trainer.eval_dataset:
        prompt = row["prompt_ids"]
        gained = []
        for answer in (row["chosen_ids"], row["rejected_ids"]):
            ours, theirs = (
                plain_logps(model, prompt + answer, len(prompt)) for model in (policy, reference)
            )
            gained.append(stage.section.beta * float(ours.sum() - theirs.sum()))
            tokens += ours.tolist() if answer is row["chosen_ids"] else []
        losses.append(math.log1p(math.exp(gained[1] - gained[0])))
        rewards.append(gained)
    expected = {
        "eval_loss": np.mean(losses) - 0.5 * np.mean(tokens),
        "eval_rewards/chosen": np.mean(rewards, 0)[0],
        "eval_rewards/margins": np.mean([chosen - rejected for chosen, rejected in rewards]),
        "eval_rewards/accuracies": np.mean([chosen > rejected for chosen, rejected in rewards]),
    }
    assert abs(expected["eval_rewards/margins"]) > 0.01
    for metrics in found:
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-4)


def published(tiny_phi, work, monkeypatch, exact: bool) -> tuple[int, list[float]]:
    """(step of the checkpoint that is kept, validation losses) of a run that learns long answers.

    The validation rows are one of them, which gets better, and three answers of one token that the
    base knew, which get worse; each is a batch of its own.
    """
    work.mkdir()
    if not exact:
        monkeypatch.setattr(validation, "score_whole_set", lambda *args: None)
    shape = {"batch_size": 1, "gradient_accumulation": 4, "learning_rate": 1e-2}
    steps = {"max_steps": 4, "eval_steps": 1, "save_steps": 1, "save_total_limit": 4}
    stage = stage_of("instruction", tiny_phi, work, **shape, **steps)
    asked = [f"Instruct: {row['prompt']}\nOutput:\n" for row in diseases()[:4]]
    prompts = tokenizer_of(stage)(asked)["input_ids"]
    it = tokenizer_of(stage)("It")["input_ids"]
    noise = np.random.default_rng(5).integers(5, 500, (4, 70)).tolist()
    long = rows_of(prompts, noise)
    held_out = rows_of(prompts, [noise[0], it, it, it])
    trainer, counts = sft_trainer(stage, long, held_out)
    loop.train(stage, trainer, counts)
    history = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    monkeypatch.undo()
    return trainer.state.best_global_step, history


def test_the_mean_over_tokens_keeps_the_checkpoint_that_batch_means_reject(
    tiny_phi, tmp_path, monkeypatch
):
    best, losses = published(tiny_phi, tmp_path / "exact", monkeypatch, exact=True)
    other, means = published(tiny_phi, tmp_path / "means", monkeypatch, exact=False)
    assert best == 4 == 1 + int(np.argmin(losses)) and losses == sorted(losses, reverse=True)
    assert other == 1 == 1 + int(np.argmin(means))


@pytest.mark.parametrize("count", [16, 5])
def test_a_step_of_pairs_learns_the_same_in_every_shape(tiny_phi, tmp_path, count):
    """Two steps by plain gradient descent, so that weights show gradients; with 16 pairs, and with
    5, which are gone through more than three times."""
    import torch

    found = []
    for size, accumulation in SHAPES:
        stage = stage_of(
            "safety",
            tiny_phi,
            tmp_path / f"{size}",
            **{"batch_size": size, "gradient_accumulation": accumulation, "max_steps": 2},
            **{"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 1e9},
            **{"lr_scheduler": "constant", "sft_weight": 0.5},
        )
        trainer, counts = dpo_trainer(stage, made_up_pairs(count), made_up_pairs(2))
        seen = []
        collate = trainer.data_collator
        trainer.data_collator = lambda items, collate=collate, seen=seen: (
            seen.append(items) or collate(items)
        )
        patches.hook_losses(stage, trainer, counts)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {n: p.detach() for n, p in trainer.model.named_parameters() if "default" in n}
        found.append((losses, weights))

        assert [len(batch) for batch in seen] == [size] * (2 * accumulation)
        pairs = [pair for batch in seen for pair in batch]
        asked = [tuple(pair["prompt_ids"]) for pair in pairs]
        for start in range(0, 16 - count + 1, count):
            assert len(set(asked[start : start + count])) == count, "a pass is not complete"
        lengths = [
            2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in pairs
        ]
        assert counts.tokens.tolist() == [sum(lengths[:8]), sum(lengths[8:])]
        assert counts.chosen.sum() == sum(len(p["chosen_ids"]) for p in pairs)
    if count < 8:
        assert asked[:count] != asked[count : 2 * count], "every pass in the same order"
    (losses, weights), *others = found
    first = [-plain for p in pairs[:8] for plain in first_logps(stage, p)]
    assert losses[0] == pytest.approx(math.log(2) + 0.5 * np.mean(first), abs=1e-4)
    for other_losses, other_weights in others:
        assert other_losses == pytest.approx(losses, abs=1e-4)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", PREFERENCE_LOSSES)
def test_every_loss_of_pairs_is_trls(kind):
    """What validation computes, against the trainer's own from the same log-probabilities."""
    import torch
    from trl import DPOTrainer

    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 9, 1, 5, 9, 2])  # of three chosen answers, then three rejected ones
    mask = (torch.arange(1, 12) > 1) & (torch.arange(1, 12) <= 1 + lengths[:, None])
    policy, reference = (-4 * torch.rand(6, 10, generator=generator) * mask[:, 1:] for _ in "ab")
    given = SimpleNamespace(log_probs=policy, entropy=policy, mean_logits=policy)
    given.is_top1 = mask[:, 1:]
    sums = reference.sum(1).chunk(2)
    trainer = SimpleNamespace(
        **{
            "model": torch.nn.Linear(1, 1),
            "beta": 0.3,
            "loss_types": [kind],
            "loss_weights": [1.0],
        },
        **{"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl"},
        **{"use_weighting": False, "aux_loss_enabled": False, "label_smoothing": 0.0},
        **{
            "_metrics": defaultdict(lambda: defaultdict(list)),
            "_total_train_tokens": 0,
            "_tp_size": 1,
        },
        accelerator=SimpleNamespace(
            **{"device": "cpu", "gather_for_metrics": lambda t: t, "gather": lambda t: t}
        ),
    )
    batch = {
        "input_ids": torch.zeros(6, 11, dtype=torch.long),
        "attention_mask": torch.ones(6, 11, dtype=torch.long),
        "completion_mask": mask.long(),
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    theirs = DPOTrainer._compute_loss(trainer, lambda **kwargs: given, batch, False)
    ours = validation.pair_scores(trainer, lambda **kwargs: given, batch)["pair_loss"][0]
    assert ours.mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    assert ours.shape == (3,) and ours.std() > 0.01


def first_logps(stage: Run, pair: dict) -> list[float]:
    """Log-probabilities of a chosen answer before the first step."""
    model = load_model(stage)
    disturb(model)
    return plain_logps(
        model, pair["prompt_ids"] + pair["chosen_ids"], len(pair["prompt_ids"])
    ).tolist()


@pytest.mark.parametrize(
    ("settings", "done"),
    [
        ({"max_steps": 3, "warmup_steps": 30}, 2),
        ({"max_steps": 1, "warmup_steps": 30}, 0),
        ({"max_steps": 100, "warmup_steps": 30}, 30),
        ({"max_steps": 100, "warmup_steps": 30, "lr_scheduler": "constant"}, 0),
    ],
)
def test_the_warm_up_that_is_done_is_said_and_recorded(monkeypatch, capsys, settings, done):
    section = build([("test", {"model_type": "own", "domain": settings})]).domain
    assert arguments.warmup_steps(section) == done
    one = np.ones(1, np.int64)
    counts = SimpleNamespace(tokens=one, supervised=one, padding=one)
    state = SimpleNamespace(
        global_step=1, log_history=[], best_model_checkpoint=None, best_metric=None
    )
    trainer = SimpleNamespace(
        state=state,
        args=SimpleNamespace(world_size=1, n_gpu=0),
        train=lambda **_: None,
        remove_callback=lambda _: None,
        add_callback=lambda _: None,
    )
    monkeypatch.setattr(loop, "progress", lambda *_: None)
    monkeypatch.setattr(loop.patches, "prepare", lambda *_: None)
    monkeypatch.setattr(loop.distributed, "on_main", lambda *_: None)
    stage = SimpleNamespace(name="domain", section=section, work=None)
    assert loop.train(stage, trainer, counts)["warmup_steps"] == done
    said = f"warm-up over {done} steps, not warmup_steps: 30" in capsys.readouterr().out
    assert said == (done != 30)


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_the_first_step_learns_and_the_rest_of_the_schedule_is_as_configured(scheduler):
    import torch
    from transformers import get_scheduler

    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)

    def rates(schedule, used):
        found = []
        for _ in range(10):
            found.append(schedule.get_last_lr()[0])
            assert used.param_groups[0]["lr"] == found[-1]
            used.step()
            schedule.step()
        return found

    trainer = SimpleNamespace(
        args=SimpleNamespace(warmup_steps=4, lr_scheduler_type=scheduler), optimizer=optimizer()
    )
    trainer.create_scheduler = lambda: get_scheduler(scheduler, trainer.optimizer, 4, 10)
    validation.warm_up_from_first_step(trainer)
    ours = rates(trainer.create_scheduler(), trainer.optimizer)
    plain = optimizer()
    theirs = rates(get_scheduler(scheduler, plain, 4, 10), plain)
    assert ours[4:] == theirs[4:]
    assert ours[:4] == ([2.0] * 4 if scheduler == "constant" else [0.5, 1.0, 1.5, 2.0])


def test_a_released_model_holds_no_memory(tiny_phi, tmp_path):
    """Something always refers to a trainer's model; its storage goes all the same."""
    stage = stage_of("domain", tiny_phi, tmp_path, quantization="nf4")
    model = load_model(stage)
    tensors = [*model.parameters(), *model.buffers()]
    held = [tensor.untyped_storage() for tensor in tensors]
    assert sum(storage.nbytes() for storage in held) > 100_000
    del held
    validation.release(model)
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 0


def test_a_number_that_does_not_fit_in_memory_is_left_out(tiny_phi, tmp_path, monkeypatch, capsys):
    config = stage_of("domain", tiny_phi, tmp_path).config
    monkeypatch.setattr(machine, "available_memory", lambda: 6_000_000_000)
    assert validation.shipped_loss(config, tmp_path, 2_780_000_000, []) is None
    assert "8.0 GB needed, 6.0 free" in capsys.readouterr().out
