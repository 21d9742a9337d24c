"""Stage 2, instruction tuning: supervised fine-tuning on questions and answers.

    python train_instruction.py --checkpoint domain_checkpoint
    python train_instruction.py --checkpoint domain_checkpoint --config configs/phi-2_8gb.yaml

Continues the domain stage's adapter on data/<model_type>/instruction. Only the answer and its end
token are supervised. Base model, prompt and configuration come from the checkpoint's stage.json
unless --config names another YAML. Writes instruction_checkpoint/. The same command resumes
interrupted work and reuses a finished result.
"""

from __future__ import annotations

from pathlib import Path

from liteguard import checkpoints, cli, datasets, distributed, training


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a domain checkpoint")
    parser.add_argument("--data", metavar="DIR", help="default: data/<model_type>")
    parser.add_argument("--output", metavar="DIR", default="instruction_checkpoint")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    parent = checkpoints.read_stage(Path(args.checkpoint), "domain")
    config = cli.resolve_config(args, parent=parent)
    cli.print_config(config, "model", "instruction")

    # 2. Inputs
    stage = training.plan(
        "instruction",
        config,
        output=Path(args.output),
        data_dir=Path(args.data or parent["data_dir"]),
        parent=Path(args.checkpoint),
    )
    tokenizer = training.load_tokenizer(stage)
    rows = datasets.load_split(stage.data_dir, "instruction", "train")
    held_out = datasets.load_split(stage.data_dir, "instruction", "validation")
    train_set = training.tokenize_answers(
        tokenizer, rows[: training.needed_rows(config.instruction)], config, "train"
    )
    eval_set = training.tokenize_answers(
        tokenizer, held_out[: config.instruction.max_eval_rows], config, "validation"
    )
    training.describe(stage, len(rows), tokenizer.decode(train_set[0]["input_ids"]))
    training.check_disk(stage.output, 1.0)
    if args.dry_run:
        training.load_model(stage)
        print("dry run: nothing written")
        return
    stage.work = distributed.on_main(
        checkpoints.open_work, stage.output, stage.inputs, args.overwrite
    )
    if stage.work is None:
        print(f"{stage.output} is finished and was made from the same inputs: reused")
        return

    # 3. Work
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        model=training.load_model(stage),
        args=SFTConfig(
            **training.trainer_arguments(stage),
            # Sequences arrive tokenized, with -100 on every token of the question, and in order:
            # preparation shuffled them, and each step's are sorted by length.
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(training.order_by_length(train_set, config.instruction)),
        eval_dataset=Dataset.from_list(eval_set),
        processing_class=tokenizer,
        callbacks=training.callbacks(stage),
    )
    metrics = training.train(stage, trainer)

    # 4. Results
    counts = {"train": len(rows), "validation": len(held_out)}
    training.finish(stage, trainer, tokenizer, metrics, counts)
    print(f"wrote {stage.output}\nnext: python train_safety.py --checkpoint {stage.output}")


if __name__ == "__main__":
    cli.run(main)
