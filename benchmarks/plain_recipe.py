"""The recipe that this project started from, kept runnable as the baseline to beat.

    python benchmarks/plain_recipe.py --stage instruction --model DIR --data data/smollm2 --steps 6
    python benchmarks/plain_recipe.py --stage safety --model DIR --data data/smollm2 --steps 4

Hugging Face's Trainer as most notebooks use it: every example a row padded to `--max_length` (or,
with `--padding longest`, to the longest of its batch), the padding token is the end token (so the
end of an answer is never learned), questions are trained on like answers, all logits are computed,
LoRA on the layer names of Llama (on Phi, half of them match nothing), a 4-bit base, float16 on a
GPU, no validation, no early stopping, and DPO against the raw base model. It trains, its loss
falls, and nothing it prints says what is wrong. Use it for comparisons only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PARTS = {"domain": "domain", "instruction": "instruction", "safety": "preference"}


def read(data: Path, stage: str, count: int) -> list[dict]:
    """The first `count` rows of a prepared split, from the front again when they run out."""
    path = data / PARTS[stage] / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]
    return [rows[i % len(rows)] for i in range(count)]


def text(row: dict) -> tuple[str, str]:
    """(what is not counted as supervised, what is)."""
    if "text" in row:
        return "", row["text"]
    return f"Instruct: {row['prompt']}\nOutput:\n", row.get("completion") or row["chosen"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=PARTS, default="instruction")
    parser.add_argument("--model", required=True, help="directory of the base model")
    parser.add_argument("--data", type=Path, required=True, help="a prepared data directory")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--padding", choices=("max_length", "longest"), default="max_length")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.float16 if cuda else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.eos_token
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model,
        dtype=dtype,
        quantization_config=four_bit if args.quantization == "nf4" else None,
        device_map={"": 0 if cuda else "cpu"},
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    model = get_peft_model(
        model,
        LoraConfig(
            r=args.rank, lora_alpha=args.rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
    )
    rows = read(args.data, args.stage, args.steps * args.batch_size * args.gradient_accumulation)
    common = {
        "output_dir": tempfile.mkdtemp(prefix="plain_recipe_"),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation,
        "learning_rate": args.learning_rate,
        "fp16": cuda,
        "use_cpu": not cuda,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    tokens = {"supervised": 0, "real": 0, "fed": 0}
    if args.stage == "safety":
        from trl import DPOConfig, DPOTrainer

        pairs = [
            {"prompt": text(row)[0], "chosen": row["chosen"], "rejected": row["rejected"]}
            for row in rows
        ]
        trainer = DPOTrainer(
            model=model,
            args=DPOConfig(**common, beta=0.1, max_length=args.max_length),
            train_dataset=Dataset.from_list(pairs),
            processing_class=tokenizer,
        )
        for pair in trainer.train_dataset:
            both = len(pair["chosen_ids"]) + len(pair["rejected_ids"])
            tokens["supervised"] += both
            tokens["real"] += both + 2 * len(pair["prompt_ids"])
    else:
        from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

        examples = []
        for row in rows:
            question, answer = text(row)
            ids = tokenizer(
                question + answer + tokenizer.eos_token,
                truncation=True,
                max_length=args.max_length,
                padding="max_length" if args.padding == "max_length" else False,
            )
            real = sum(ids["attention_mask"])
            tokens["real"] += real
            # What the comparison counts, though this recipe computes a loss on the question too.
            tokens["supervised"] += max(real - len(tokenizer(question)["input_ids"]), 0)
            examples.append({key: ids[key] for key in ("input_ids", "attention_mask")})
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**common),
            train_dataset=Dataset.from_list(examples),
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        )
        collate = trainer.data_collator

        def counted(batch: list[dict]) -> dict:
            found = collate(batch)
            tokens["fed"] += found["input_ids"].numel()
            return found

        trainer.data_collator = counted
    started, used = time.monotonic(), time.process_time()
    trainer.train()
    seconds, used = time.monotonic() - started, time.process_time() - used
    fed = tokens["fed"] or tokens["real"]
    result = {
        "train_runtime_s": round(seconds, 1),
        "train_cpu_s": round(used, 1),
        "tokens": tokens["real"],
        "supervised_tokens": tokens["supervised"],
        "supervised_tokens_per_s": round(tokens["supervised"] / seconds, 1),
        "tokens_per_s": round(tokens["real"] / seconds, 1),
        "padding_share": round(1 - tokens["real"] / fed, 4),
        "peak_rss_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "peak_gpu_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0,
    }
    print(json.dumps(result, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
