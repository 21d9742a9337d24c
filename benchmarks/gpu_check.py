"""Training steps at full size on one GPU: speed, utilisation and memory, beside other recipes.

    python benchmarks/gpu_check.py                      # Phi-1.5 and Phi-2, under 10 minutes
    python benchmarks/gpu_check.py --shape phi-2 --json gpu_check.json
    python benchmarks/gpu_check.py --shape tiny --device cpu

Random weights of the exact shapes, made and quantised on the device matrix by matrix, so nothing is
downloaded and the 16-bit model never exists. All recipes train on the same rows, of mixed lengths
up to 2048 tokens (domain: full rows), with LoRA r=32 on every layer of an NF4 base:

  plain  one padded row per example, micro-batch 4, logits of every position, stepwise GELU, AdamW
         in float32, no checkpointing until memory runs out (then checkpointing, then smaller
         micro-batches); DPO runs its reference beside the policy.
  ours   packed rows without padding, logits where they are scored, fused GELU, checkpointing and
         optimizer as the YAML says; DPO computes its reference before the policy.
  trl    TRL at its best (see trl_recipe.py): SFTTrainer with rows packed into sequences of full
         length where its attention keeps them apart, its own head, bfloat16 adapters,
         checkpointing and optimizer as ours; DPOTrainer with padded pairs, which is all it has.

Before that: which attention kernels keep packed examples apart and agree with each other, and
whether the paged 8-bit optimizer steps as AdamW does. On a GPU the goals in GOALS are gates: what
misses one is listed, and the exit code is 1.

tokens/s counts real tokens, never padding. MFU is the model's floating point operations (formula in
`model_flops`; recomputation and padding are not counted) over time x the peak of a matrix product
measured in the same run. Peak memory is torch's peak allocated on a GPU, peak RSS on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import trl_recipe

from liteguard import cli, machine, memory, models
from liteguard.config import CONFIG_DIR, Config, build, read_yaml
from liteguard.errors import WorkError
from liteguard.training import isolation, loop, memory_estimate, patches
from liteguard.training.memory_terms import Shapes, adapter_matrices, read_shapes
from liteguard.training.micro_batch import micro_batches
from liteguard.training.packing import segment_attention

YAML = {"phi-1_5": "phi-1_5.yaml", "phi-2": "phi-2_8gb.yaml", "tiny": "phi-2_8gb.yaml"}
STAGES = ("domain", "instruction", "safety")
PLAIN_BATCH = 4
# For Phi-2 at 2048 tokens; GB are 10^9 bytes of torch's peak allocated.
GOALS = {
    "peak_gb": {"domain": 5.5, "instruction": 5.5, "safety": 7.0},
    "speed": {"plain": 3.0, "trl": 1.3},
    "minutes": 10.0,
}


# What is trained


def architecture(shape: str) -> Any:
    """The transformers config of a shape; 'tiny' is for tests."""
    if shape != "tiny":
        return memory.phi_architecture(shape)
    from transformers import PhiConfig

    return PhiConfig(
        vocab_size=640,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        partial_rotary_factor=0.5,
        max_position_embeddings=2048,
        hidden_act="gelu_new",
    )


def random_base(config_: Any, dtype: Any, device: str, seed: int = 0) -> Any:
    """A model with random weights and its decoder's linear layers in double-quantised NF4.

    Each matrix is made on the device, quantised there and dropped before the next one is made.
    """
    import bitsandbytes
    import torch

    config_._attn_implementation = "sdpa"
    model = models.meta_model(config_)
    torch.manual_seed(seed)

    def fill(shape: Any, name: str) -> Any:
        if name.endswith("bias"):
            return torch.zeros(shape, dtype=dtype, device=device)
        if "norm" in name:
            return torch.ones(shape, dtype=dtype, device=device)
        return torch.randn(shape, dtype=dtype, device=device) * 0.02

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            quantised = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
                device="meta",
            )
            weight = bitsandbytes.nn.Params4bit(
                fill(module.weight.shape, name),
                requires_grad=False,
                compress_statistics=True,
                quant_type="nf4",
                module=quantised,
            )
            quantised.weight = weight.to(device)
            if module.bias is not None:
                quantised.bias = torch.nn.Parameter(fill(module.bias.shape, "bias"))
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, quantised)
            del weight
        elif "rotary" in name:
            # Its tables are buffers without data so far; they follow from the config.
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, type(module)(config=config_).to(device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            made = torch.nn.Parameter(fill(parameter.shape, name), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, made)
    model.tie_weights()
    model.requires_grad_(False)
    model.config.use_cache = False
    models.keep_gradients_after_evaluation(model)
    model.is_loaded_in_4bit = True  # PEFT then takes its 4-bit LoRA layer
    return model


def make_rows(stage: str, count: int, longest: int, vocabulary: int, seed: int = 0) -> list[dict]:
    """Rows of ids and labels. Domain: full rows. Instruction: questions and answers whose lengths
    are log-normal (median longest / 8) up to `longest`, 40 % question. Safety: such pairs."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def sequence(prompt: list[int], length: int) -> dict:
        answer = torch.randint(5, vocabulary, (length,), generator=generator).tolist()
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    rows = []
    for index in range(count):
        if stage == "domain":
            rows.append(sequence([], longest))
            continue
        draw = torch.randn((), generator=generator).item()
        total = int(min(max(longest / 8 * 2.718 ** (0.9 * draw), 16), longest))
        # One row of the full length, so that the peak is that of the longest sequence.
        total = longest if index == 0 else total
        question = int(0.4 * total)
        prompt = torch.randint(5, vocabulary, (question,), generator=generator).tolist()
        if stage == "instruction":
            rows.append(sequence(prompt, total - question))
        else:
            short = max(8, (total - question) // 2)
            rows.append(
                {
                    "chosen": sequence(prompt, total - question),
                    "rejected": sequence(prompt, short),
                }
            )
    return rows


def sequences_of(stage: str, rows: list[dict]) -> list[dict]:
    """The sequences of rows; a preference row is two, chosen and rejected in turn."""
    if stage != "safety":
        return rows
    return [row[side] for row in rows for side in ("chosen", "rejected")]


def targets(sequence: dict) -> int:
    """Supervised tokens: the first token has nothing before it that could predict it."""
    return sum(label != -100 for label in sequence["labels"][1:])


def padded_batches(
    rows: list[list[dict]], batch_size: int, padding: int, device: str
) -> list[dict[str, Any]]:
    """Micro-batches of `batch_size` groups, one sequence a row, padded on the right."""
    import torch

    batches = []
    for start in range(0, len(rows), batch_size):
        batch = [s for group in rows[start : start + batch_size] for s in group]
        longest = max(len(s["input_ids"]) for s in batch)

        def fill(key: str, value: int, batch=batch, longest=longest) -> Any:
            return torch.tensor(
                [s[key] + [value] * (longest - len(s[key])) for s in batch], device=device
            )

        mask = [[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in batch]
        batches.append(
            {
                "input_ids": fill("input_ids", padding),
                "labels": fill("labels", -100),
                "attention_mask": torch.tensor(mask, device=device),
            }
        )
    return batches


# The two recipes: each makes a step from rows


class Recipe:
    """A model with its optimizer; `step(rows)` trains on all of them once."""

    def __init__(self, stage: str, config: Config, base: Any, arithmetic: SimpleNamespace):
        self.stage, self.config, self.section = stage, config, getattr(config, stage)
        self.device, self.autocast = arithmetic.device, arithmetic.autocast
        self.model = models.add_adapter(base, config)
        self.model.train()
        if stage == "safety":
            for module in self.model.modules():  # as TRL does for DPO
                if type(module).__name__ == "Dropout":
                    module.p = 0.0
            self.model.add_adapter("ref", self.model.peft_config["default"])
            self.model.set_adapter("default")
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.make_optimizer()

    def checkpoint(self, on: bool) -> None:
        if on:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def run(self, rows: list[list[dict]], steps: int, after_first: Callable[[], None]) -> list:
        """Losses of 1 + `steps` optimizer steps; `after_first` is called between."""
        losses = [self.step(rows)]
        after_first()
        return losses + [self.step(rows) for _ in range(steps)]

    @contextlib.contextmanager
    def reference(self) -> Any:
        import torch
        from trl.trainer.utils import use_adapter

        with torch.no_grad(), use_adapter(self.model, "ref"):
            yield

    def update(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def dpo_loss(self, policy: Any, reference: Any) -> Any:
        """Mean DPO loss; log-probabilities of (chosen, rejected, chosen, rejected, ...)."""
        import torch

        ratios = (policy - reference).view(-1, 2)
        margins = self.config.safety.beta * (ratios[:, 0] - ratios[:, 1])
        return -torch.nn.functional.logsigmoid(margins).mean()


class Ours(Recipe):
    name = "ours"

    def __init__(self, *args: Any):
        super().__init__(*args)
        from trl.trainer.utils import add_fused_lm_head

        model = self.model.get_base_model()
        add_fused_lm_head(model)
        patches.score_targets_only(
            SimpleNamespace(
                model=self.model, accelerator=SimpleNamespace(unwrap_model=lambda model: model)
            )
        )
        isolation.pack(self.model, model.config, self.section.max_length)
        self.checkpoint(self.section.gradient_checkpointing)
        self.note = "checkpointing" if self.section.gradient_checkpointing else "no checkpointing"

    def make_optimizer(self) -> Any:
        import torch

        options = {"lr": self.section.learning_rate}
        if self.device == "cpu" or "8bit" not in self.section.optimizer:
            return torch.optim.AdamW(self.trained, **options)
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(self.trained, **options)

    def step(self, rows: list[list[dict]]) -> float:
        import numpy as np
        import torch

        # A pair is two sequences of the longest length.
        longest = self.section.max_length * self.section.batch_size
        longest *= 2 if self.stage == "safety" else 1
        sizes = np.array([sum(len(s["input_ids"]) for s in group) for group in rows])
        groups, _ = micro_batches([list(range(len(rows)))], sizes, longest)
        # Padded here, and taken out again by `pack_forward`, as in the trainers.
        batches = [
            padded_batches([rows[i] for i in group], len(group), 0, self.device)[0]
            for group in groups
        ]
        scored = sum(targets(sequence) for group in rows for sequence in group)
        total = 0.0
        for group, batch in zip(groups, batches, strict=True):
            with self.autocast():
                if self.stage == "safety":
                    with self.reference():
                        before = self.sums(batch)
                    loss = self.dpo_loss(self.sums(batch), before)
                    loss = loss * len(group) / len(rows)
                else:
                    loss = self.model(
                        **batch, fused_lm_head=True, num_items_in_batch=torch.tensor(scored)
                    ).loss
            loss.backward()
            total += loss.item()
        self.update()
        return total

    def sums(self, batch: dict) -> Any:
        """Summed log-probability of every row's targets, shape (rows,)."""
        return self.model(**batch, fused_lm_head=True).log_probs.sum(1)


class Plain(Recipe):
    name = "plain"

    def make_optimizer(self) -> Any:
        import torch

        return torch.optim.AdamW(self.trained, lr=self.section.learning_rate)

    batch_size, checkpointed = PLAIN_BATCH, False

    def step(self, rows: list[list[dict]]) -> float:
        """One step; where memory runs out, checkpointing first, then smaller micro-batches.

        What worked is kept for the next steps.
        """
        import torch

        if not self.checkpointed:
            try:
                self.note = f"micro-batch {self.batch_size}, no checkpointing"
                return self.attempt(rows, self.batch_size)
            except torch.OutOfMemoryError:
                self.checkpointed = True
            self.clear()
            self.checkpoint(True)

        def smaller(batch_size: int, accumulation: int) -> float:
            self.clear()
            self.batch_size = batch_size
            self.note = f"micro-batch {batch_size}, checkpointing (out of memory without)"
            return self.attempt(rows, batch_size)

        loss, _ = loop.train_within_memory(
            smaller, self.batch_size, len(rows), explain=lambda: "The plain recipe does not fit."
        )
        return loss

    def clear(self) -> None:
        """Drop what an attempt left behind."""
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()

    def attempt(self, rows: list[list[dict]], batch_size: int) -> float:
        batches = padded_batches(rows, batch_size, padding=0, device=self.device)
        total = 0.0
        for batch in batches:
            with self.autocast():
                if self.stage == "safety":
                    policy = self.sums(batch)
                    with self.reference():
                        before = self.sums(batch)
                    loss = self.dpo_loss(policy, before)
                else:
                    loss = self.model(**batch).loss
            (loss / len(batches)).backward()
            total += loss.item() / len(batches)
        self.update()
        return total

    def sums(self, batch: dict) -> Any:
        labels = batch["labels"][:, 1:]
        logits = self.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, :-1]
        log_probs = logits.float().log_softmax(-1)
        picked = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return (picked * (labels != -100)).sum(1)


class Trl(Recipe):
    """TRL's own trainers; an epoch over the rows is one optimizer step."""

    name = "trl"

    def make_optimizer(self) -> None:
        """The trainer makes its own."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        if self.stage == "safety":
            self.model.delete_adapter("ref")  # DPOTrainer makes its own copy

    def arguments(self, accumulation: int) -> dict[str, Any]:
        import torch

        bfloat16 = self.device != "cpu"
        return {
            "output_dir": tempfile.mkdtemp(prefix="gpu_check_"),
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": accumulation,
            "max_length": self.section.max_length,
            "gradient_checkpointing": self.section.gradient_checkpointing,
            "optim": self.section.optimizer if bfloat16 else "adamw_torch",
            "learning_rate": self.section.learning_rate,
            "lr_scheduler_type": "constant",
            "bf16": bfloat16,
            "use_cpu": not bfloat16,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "dataloader_pin_memory": torch.cuda.is_available(),
        }

    def make_trainer(self, rows: list[list[dict]]) -> Any:
        from datasets import Dataset
        from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, pack_dataset

        tokenizer = any_tokenizer()
        if self.stage == "safety":
            text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
            settings = DPOConfig(**self.arguments(len(rows)), beta=self.config.safety.beta)
            trainer = DPOTrainer(
                self.model, args=settings, train_dataset=text, processing_class=tokenizer
            )
            trainer.train_dataset = Dataset.from_list([pair_ids(*pair) for pair in rows])
            self.note = "padded pairs"
        else:
            found = Dataset.from_list([sequence for [sequence] in rows])
            packing = trl_recipe.isolated(self.model)
            length = self.section.max_length
            count = len(pack_dataset(found, length, "bfd")) if packing else len(rows)
            settings = SFTConfig(**self.arguments(count), packing=packing, loss_type="nll")
            trainer = SFTTrainer(
                self.model, args=settings, train_dataset=found, processing_class=tokenizer
            )
            self.note = f"{count} packed rows" if packing else "padded rows"
        self.note += f", {self.model.config._attn_implementation}"
        if self.device == "cpu":
            trl_recipe.keep_float32(trainer.model)
        return trainer

    def run(self, rows: list[list[dict]], steps: int, after_first: Callable[[], None]) -> list:
        """Losses of 1 + `steps` optimizer steps; `after_first` is called between."""
        from transformers import PrinterCallback, TrainerCallback

        class AfterFirst(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    after_first()

        trainer = self.make_trainer(rows)
        trainer.args.max_steps = 1 + steps
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(AfterFirst())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def any_tokenizer() -> Any:
    """A tokenizer, because trainers ask for one; the rows are token ids already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    core = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **special)


def pair_ids(chosen: dict, rejected: dict) -> dict[str, list[int]]:
    """A pair of sequences with one prompt, as DPOTrainer's collator takes it."""
    start = chosen["labels"].count(-100)
    return {
        "prompt_ids": chosen["input_ids"][:start],
        "chosen_ids": chosen["input_ids"][start:],
        "rejected_ids": rejected["input_ids"][start:],
    }


# Paths: attention kernels and the 8-bit optimizer


def attention_paths(device: str) -> dict[str, str]:
    """Kernel or attention -> what came of it: 'isolated ...', 'not available ...' or 'REFUSED'.

    Every kernel of PyTorch attends within segments of the sizes of a packed micro-batch, forward
    and backward, and is compared with float32 arithmetic; every attention of transformers goes
    through `isolation.pack`.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, 700, 80, device=device) for _ in range(3)]
    lengths = [1, 400, 299]

    def attend(kind: Any) -> list[Any]:
        q, k, v = (x.to(kind).detach().requires_grad_() for x in inputs)
        result, _ = segment_attention(None, q, k, v, None, segment_lengths=lengths)
        result.float().square().sum().backward()
        return [x.float() for x in (result.detach(), q.grad, k.grad, v.grad)]

    with sdpa_kernel(SDPBackend.MATH):
        exact = attend(torch.float32)
    found = {}
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        try:
            with sdpa_kernel(getattr(SDPBackend, backend)):
                results = attend(dtype)
        except RuntimeError as error:
            found[backend] = f"not available ({str(error).splitlines()[0][:60]})"
            continue
        wrong = max(((a - b).norm() / b.norm()).item() for a, b in zip(results, exact, strict=True))
        verdict = "agrees" if wrong < 0.02 else "REFUSED, differs"
        found[backend] = f"{verdict} (error {wrong:.1e})"
    for attention in ("sdpa", "eager", "flash_attention_2"):
        if attention == "flash_attention_2" and not importlib.util.find_spec("flash_attn"):
            found[attention] = "not available (flash_attn is not installed)"
            continue
        model = scoring_model(device, dtype, attention)
        try:
            isolation.pack(model, model.config, 2048)
            found[attention] = "isolated"
        except WorkError as error:
            found[attention] = f"REFUSED ({str(error).splitlines()[0][:60]})"
    return found


def scoring_model(device: str, dtype: Any, attention: str) -> Any:
    """The tiny shape with an adapter and the trainers' head."""
    from trl.trainer.utils import add_fused_lm_head

    config = build([("tiny", read_yaml(CONFIG_DIR / YAML["tiny"]))])
    base = random_base(architecture("tiny"), dtype, device)
    base.set_attn_implementation(attention)
    model = models.add_adapter(base, config)
    add_fused_lm_head(base)
    return model


def optimizer_path(device: str) -> str:
    """How far one step of bitsandbytes' paged 8-bit AdamW is from torch's AdamW."""
    import torch

    if device == "cpu":
        return "not available (a CPU has no paged memory)"
    import bitsandbytes

    torch.manual_seed(0)
    start, gradient = (torch.randn(256, 256, device=device) for _ in range(2))
    moved = []
    for kind in (bitsandbytes.optim.PagedAdamW8bit, torch.optim.AdamW):
        parameter = torch.nn.Parameter(start.clone())
        optimizer = kind([parameter], lr=1e-3, weight_decay=0.0)
        for _ in range(3):
            parameter.grad = gradient.clone()
            optimizer.step()
        moved.append(parameter.detach() - start)
    wrong = ((moved[0] - moved[1]).norm() / moved[1].norm()).item()
    return f"{'agrees' if wrong < 0.05 else 'REFUSED, differs'} (error {wrong:.1e})"


# Measuring


def matmul_peak(dtype: Any, device: str) -> float:
    """Best FLOP/s of a square matrix product in `dtype`, over several runs of two sizes."""
    import torch

    best = 0.0
    for size in (8192, 4096) if device != "cpu" else (1024,):
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        for _ in range(12 if device != "cpu" else 4):
            synchronize(device)
            start = time.perf_counter()
            a @ b
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        # 5: the kernel forgets the peak resident size of this process (proc(5)).
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def read_peak(device: str) -> int:
    """Bytes: torch's peak allocated, or peak RSS since `reset_peak`."""
    import torch

    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in status if line.startswith("VmHWM")).split()[1])
    except (OSError, StopIteration):
        return round(machine.peak_rss_gb() * 1e9)


def model_flops(shapes: Shapes, lora: int, stage: str, sequences: list[dict]) -> float:
    """Floating point operations that training on these sequences takes, whatever the recipe.

    Per token: 2 N for the forward and 2 N for the backward pass through N frozen weights (their own
    gradient is not needed), 6 per LoRA parameter (Kaplan et al. 2020, "Scaling Laws", section 2.1:
    2 forward, 4 backward). Causal attention: 2 L^2 q_width a layer forward, twice that backward.
    The head at scored tokens only: 4 hidden x vocabulary. DPO adds the reference's forward pass.
    """
    total = 0.0
    for s in sequences:
        length, scored = len(s["input_ids"]), targets(s)
        attention = shapes.layers * 2 * length**2 * shapes.q_width
        forward = 2 * (shapes.linear_parameters + lora) * length + attention
        forward += 2 * shapes.hidden * shapes.vocabulary * scored
        total += 2 * forward + 2 * lora * length + attention
        if stage == "safety":
            total += forward
    return total


def measure(recipe: Recipe, rows: list[list[dict]], steps: int) -> dict[str, Any]:
    """Seconds per step and peak bytes after one warm-up step, loss of every step.

    The warm-up step allocates gradients and optimizer states, and finds out what fits.
    """
    started = [0.0]

    def after_first() -> None:
        synchronize(recipe.device)
        reset_peak(recipe.device)
        started[0] = time.perf_counter()

    losses = recipe.run(rows, steps, after_first)
    synchronize(recipe.device)
    return {
        "seconds": (time.perf_counter() - started[0]) / steps,
        "losses": losses,
        "peak_bytes": read_peak(recipe.device),
        "note": recipe.note,
    }


def check(shape: str, args: argparse.Namespace, peak: float) -> list[dict[str, Any]]:
    """All recipes on the three stages of one shape; prints a line for each."""
    import torch

    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    arithmetic = SimpleNamespace(
        device=args.device,
        autocast=lambda: (
            torch.autocast(args.device, dtype=dtype)
            if dtype != torch.float32
            else contextlib.nullcontext()
        ),
    )
    longest = args.length or (64 if shape == "tiny" else 2048)
    small = {"batch_size": 1, "max_length": longest}
    config = build(
        [
            (shape, read_yaml(CONFIG_DIR / YAML[shape])),
            ("gpu_check", {stage: small for stage in STAGES}),
        ]
    )
    found = []
    for stage in STAGES:
        rows = make_rows(stage, args.rows, longest, architecture(shape).vocab_size)
        sequences = sequences_of(stage, rows)
        width = 2 if stage == "safety" else 1
        groups = [sequences[i : i + width] for i in range(0, len(sequences), width)]
        tokens = sum(len(s["input_ids"]) for s in sequences)
        scored = sum(map(targets, sequences))
        shapes = read_shapes(architecture(shape))
        lora = sum(adapter_matrices(shapes, config.domain.lora_rank, "all"))
        flops = model_flops(shapes, lora, stage, sequences)
        results = {}
        for kind in (Ours, Trl, Plain):
            base = random_base(architecture(shape), dtype, args.device)
            if kind is Ours:
                models.fuse_gelu(base)
            recipe = kind(stage, config, base, arithmetic)
            result = measure(recipe, groups, args.steps)
            result |= {
                "shape": shape,
                "stage": stage,
                "recipe": kind.name,
                "tokens": tokens,
                "supervised_tokens": scored,
                "tokens_per_s": tokens / result["seconds"],
                "supervised_tokens_per_s": scored / result["seconds"],
                "mfu": flops / result["seconds"] / peak,
            }
            if kind is Ours:
                estimate = memory_estimate.estimate(
                    config, stage, base.config, dtype=dtype, device=args.device
                )
                result["estimate_bytes"] = estimate.total
            results[kind.name] = result
            found.append(result)
            print_row(result)
            del recipe, base
            reset_peak(args.device)
        ours = results["ours"]
        for other in ("trl", "plain"):
            speed, peak_ = (
                ours[key] / results[other][key] for key in ("supervised_tokens_per_s", "peak_bytes")
            )
            ours[f"speed_over_{other}"], ours[f"memory_over_{other}"] = speed, peak_
            print(f"{'':22}ours / {other}: {speed:.2f} x the speed, {peak_:.2f} x the memory")
    return found


def misses(report: dict[str, Any]) -> list[str]:
    """What a report of a GPU says about GOALS that were not reached, and paths that were refused.

    Speed and memory count for Phi-2; a path that is not available here is none that failed.
    """
    found = [f"{name}: {text}" for name, text in report["paths"].items() if "REFUSED" in text]
    for row in report["rows"]:
        if (row["shape"], row["recipe"]) != ("phi-2", "ours"):
            continue
        name = f"phi-2 {row['stage']}"
        peak, limit = row["peak_bytes"] / 1e9, GOALS["peak_gb"][row["stage"]]
        if peak > limit:
            found.append(f"{name}: peak {peak:.2f} GB, goal {limit} GB")
        for other, goal in GOALS["speed"].items():
            speed = row[f"speed_over_{other}"]
            if speed < goal:
                found.append(f"{name}: {speed:.2f} x the speed of {other}, goal {goal} x")
    if report["wall_s"] > 60 * GOALS["minutes"]:
        found.append(f"{report['wall_s'] / 60:.1f} minutes in all, goal {GOALS['minutes']:.0f}")
    return found


def print_row(result: dict[str, Any]) -> None:
    estimate = result.get("estimate_bytes")
    print(
        f"{result['shape']:9}{result['stage']:13}{result['recipe']:7}"
        f"{result['tokens_per_s']:10,.0f}{result['supervised_tokens_per_s']:12,.0f}"
        f"{result['mfu']:8.1%}{result['peak_bytes'] / 1e9:9.2f}"
        f"{estimate / 1e9 if estimate else float('nan'):10.2f}  {result['note']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", action="append", choices=tuple(YAML), help="repeatable; default: both Phi models"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="rows (or pairs) of one step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps, after one to warm up")
    parser.add_argument("--length", type=int, help="longest row; default 2048 (tiny: 64)")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here; on a CPU: --shape tiny --device cpu")
    start = time.perf_counter()
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    peak = matmul_peak(dtype, args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}: {peak / 1e12:.2f} TFLOP/s in {str(dtype)[6:]} matrix products (measured)\n")
    paths = attention_paths(args.device) | {"paged 8-bit AdamW": optimizer_path(args.device)}
    print("\n".join(f"{path:22}{verdict}" for path, verdict in paths.items()) + "\n")
    print(
        f"{'model':9}{'stage':13}{'recipe':7}{'tokens/s':>10}{'supervised':>12}{'MFU':>8}"
        f"{'peak GB':>9}{'estimate':>10}"
    )
    rows = []
    for shape in args.shape or ["phi-1_5", "phi-2"]:
        rows += check(shape, args, peak)
    report = {
        "device": name,
        "dtype": str(dtype)[6:],
        "matmul_flops": peak,
        "torch": torch.__version__,
        "wall_s": time.perf_counter() - start,
        "paths": paths,
        "rows": rows,
    }
    print(f"\n{report['wall_s']:.0f} s")
    report["misses"] = misses(report) if args.device == "cuda" else []
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if report["misses"]:
        raise WorkError("Goals that were missed:\n" + "\n".join(report["misses"]))


if __name__ == "__main__":
    cli.run(main)
