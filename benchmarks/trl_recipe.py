"""TRL at its best, as the baseline that is hard to beat.

    python benchmarks/trl_recipe.py --config configs/smollm2-135m.yaml --data data/smollm2 --steps 4
    python benchmarks/trl_recipe.py --stage safety --parent instruction_checkpoint ...

`SFTTrainer` and `DPOTrainer` with what TRL's documentation recommends: only completions are
supervised, the head in chunks (`loss_type="nll"`), LoRA on all linear layers, a double-quantised
NF4 base, the fused AdamW, bfloat16 where the machine has it. Rows arrive as token ids (TRL's own
format for prepared data), so that both sides train on the very same tokens. How rows share a batch:

  padding_free  one sequence without padding, positions starting anew with each example. The default
                for stages 1 and 2, if a look at the model shows that no example sees another
                (`isolated`): TRL promises that for FlashAttention only, but transformers 5 makes a
                block-diagonal mask for `sdpa` out of the positions. In stage 1, texts are packed
                (`packing_strategy="bfd"`) as well.
  padded        rows padded to the longest of their batch, those of similar length together. Stage 3
                is always padded: in TRL 1.16 `DPOConfig.padding_free` has no effect.

Nothing of this project is in the way of TRL; its prompt and tokenized rows are only read.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from liteguard import (
    cli,
    config,
    machine,  # noqa: E402
    models,
)
from liteguard.config import build, read_yaml
from liteguard.rows import load_split, read_manifest, source_titles
from liteguard.training import tokens

STAGES = ("domain", "instruction", "safety")


def load(args: argparse.Namespace, settings: config.Config, dtype: Any) -> tuple[Any, Any]:
    """(model, LoRA settings or None): the base as transformers loads it, the parent's adapter."""
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    directory, revision, _ = models.model_config(settings)
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        revision=revision,
        dtype=dtype,
        quantization_config=four_bit if args.quantization == "nf4" else None,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    if args.parent:
        return PeftModel.from_pretrained(model, args.parent, is_trainable=True), None
    rank = settings.domain.lora_rank
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return model, lora


def dataset(args: argparse.Namespace, settings: config.Config, tokenizer: Any) -> Any:
    """The rows that the project's script trains on, in TRL's format."""
    from datasets import Dataset

    count = args.steps * args.batch_size * args.gradient_accumulation
    if args.stage == "safety":
        pairs = load_split(args.data, "preference", "train")
        weights = tokens.kind_weights(settings.safety, pairs)
        sources = source_titles(read_manifest(args.data), "preference")
        mixture = "train", count, weights, sources
        return Dataset.from_list(tokens.render_preferences(tokenizer, pairs, settings, *mixture))
    if args.stage == "domain":
        found = tokens.documents(tokenizer, args.data, "train", settings)
    else:
        found = tokens.answers(tokenizer, args.data, "train", settings, count)
    rows = [found.row(index) for index in range(len(found))]
    return Dataset.from_list(
        [
            {"input_ids": ids.tolist(), "completion_mask": (labels != -100).astype(int).tolist()}
            for ids, labels in rows
        ]
    )


def isolated(model: Any) -> bool:
    """Whether an example's logits stay the same beside another one when there is no padding."""
    import torch

    ids = torch.arange(20, 52, device=model.device)[None]
    positions = torch.cat([torch.arange(20), torch.arange(12)]).to(model.device)[None]
    other = torch.cat([ids[:, :20] + 100, ids[:, 20:]], dim=1)
    with torch.no_grad():
        first, second = (
            model(input_ids=i, position_ids=positions, use_cache=False).logits[:, 20:]
            for i in (ids, other)
        )
    return (first - second).abs().max().item() < 1e-3 * first.abs().max().item()


def keep_float32(model: Any) -> None:
    """Adapters back in float32, where that is the precision of the comparison.

    TRL rounds those of a quantised base to bfloat16, which a CPU without bf16 units multiplies
    hundreds of times slower.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def count_tokens(trainer: Any, batches: int) -> dict[str, int]:
    """Counts of what the first `batches` micro-batches hold; filled while the trainer runs."""
    counts = {"supervised": 0, "real": 0, "fed": 0, "batches": 0}
    collate = trainer.data_collator

    def counted(rows: list[dict]) -> dict:
        found = collate(rows)
        if counts["batches"] < batches:  # the loader may look one batch ahead
            mask = found.get("completion_mask")
            scored = found["labels"] != -100 if mask is None else mask.bool()
            size = found["input_ids"].numel()
            counts["supervised"] += int(scored[:, 1:].sum())
            counts["real"] += (
                int(found["attention_mask"].sum()) if "attention_mask" in found else size
            )
            counts["fed"] += size
            counts["batches"] += 1
        return found

    trainer.data_collator = counted
    return counts


def make_trainer(args: argparse.Namespace, settings: config.Config, dtype: Any) -> tuple[Any, str]:
    """(trainer, how its rows share a batch)."""
    import torch
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    cuda = torch.cuda.is_available()
    directory, _, loaded = models.model_config(settings)
    tokenizer = models.load_tokenizer(args.parent or directory, settings.prompt, loaded.vocab_size)
    model, lora = load(args, settings, dtype)
    batching = args.batching
    if batching == "auto":
        free = args.stage != "safety" and isolated(model)
        batching = "padding_free" if free else "padded"
    common: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="trl_recipe_"),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "gradient_checkpointing": args.gradient_checkpointing,
        "learning_rate": args.learning_rate,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": not cuda,
        "max_length": args.max_length,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    chosen = {
        "model": model,
        "train_dataset": dataset(args, settings, tokenizer),
        "processing_class": tokenizer,
        "peft_config": lora,
    }
    if args.stage == "safety":
        beta = settings.safety.beta
        trainer = DPOTrainer(args=DPOConfig(**common, beta=beta), **chosen)
    else:
        packing = args.stage == "domain" and batching == "padding_free"
        sharing = {
            "padding_free": batching == "padding_free",
            "packing": packing,
            "packing_strategy": "bfd",
            # Without packing, TRL wants rows that are cut already, and says so.
            "max_length": args.max_length if packing else None,
            "train_sampling_strategy": "group_by_length" if batching == "padded" else "random",
        }
        trainer = SFTTrainer(
            args=SFTConfig(**common | sharing, loss_type="nll", completion_only_loss=True), **chosen
        )
    if dtype == torch.float32:
        keep_float32(trainer.model)
    return trainer, batching


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, default="instruction")
    parser.add_argument("--config", required=True, help="YAML that names base model and prompt")
    parser.add_argument("--data", type=Path, required=True, help="a prepared data directory")
    parser.add_argument(
        "--parent", help="checkpoint whose adapter is trained on; default: a new one"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batching", choices=("auto", "padding_free", "padded"), default="auto")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="TRL's own default")
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    import torch

    section = {"max_length": args.max_length}
    settings = build(
        [(args.config, read_yaml(Path(args.config))), ("flags", {args.stage: section})]
    )
    dtype, _ = models.choose_dtype(args.dtype, models.model_config(settings)[2].model_type)
    trainer, batching = make_trainer(args, settings, dtype)
    counts = count_tokens(trainer, args.steps * args.gradient_accumulation)
    started, used = time.monotonic(), time.process_time()
    trainer.train()
    seconds, used = time.monotonic() - started, time.process_time() - used
    result = {
        "batching": batching,
        "train_runtime_s": round(seconds, 1),
        "train_cpu_s": round(used, 1),
        "first_loss": trainer.state.log_history[0]["loss"],
        "tokens": counts["real"],
        "supervised_tokens": counts["supervised"],
        "supervised_tokens_per_s": round(counts["supervised"] / seconds, 1),
        "tokens_per_s": round(counts["real"] / seconds, 1),
        "padding_share": round(1 - counts["real"] / counts["fed"], 4),
        "peak_rss_gb": machine.peak_rss_gb(),
        "peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
