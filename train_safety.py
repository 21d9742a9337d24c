"""Stage 3, safety alignment: DPO against the frozen instruction policy.

    python train_safety.py --checkpoint instruction_checkpoint
    python train_safety.py --checkpoint instruction_checkpoint --set safety.beta=0.2

Continues the instruction stage's adapter on data/<model_type>/preference: harmful requests, where
the chosen answer refuses and names a safe way on, and ordinary ones, where the chosen answer helps.
The reference is a frozen copy of the instruction stage's adapter, never the raw base model. Writes
final_checkpoint/. The same command resumes interrupted work and reuses a finished result.
"""

from __future__ import annotations

from pathlib import Path

from liteguard import checkpoints, cli, datasets, distributed, machine, training


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="an instruction checkpoint"
    )
    parser.add_argument("--data", metavar="DIR", help="default: data/<model_type>")
    parser.add_argument("--output", metavar="DIR", default="final_checkpoint")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    parent = checkpoints.read_stage(Path(args.checkpoint), "instruction")
    config = cli.resolve_config(args, parent=parent)
    cli.print_config(config, "model", "safety")

    # 2. Inputs
    stage = training.plan(
        "safety",
        config,
        output=Path(args.output),
        data_dir=Path(args.data or parent["data_dir"]),
        parent=Path(args.checkpoint),
    )
    tokenizer = training.load_tokenizer(stage)
    rows = datasets.load_split(stage.data_dir, "preference", "train")
    held_out = datasets.load_split(stage.data_dir, "preference", "validation")
    mixture = (
        training.kind_weights(config.safety, rows),
        datasets.source_titles(datasets.read_manifest(stage.data_dir), "preference"),
    )
    train_set = training.render_preferences(
        tokenizer, rows, config, "train", training.needed_rows(config.safety), *mixture
    )
    eval_set = training.render_preferences(
        tokenizer, held_out, config, "validation", config.safety.max_eval_rows, *mixture
    )
    pairs = f"{config.safety.batch_size} x {config.safety.gradient_accumulation} pairs"
    passes = training.needed_rows(config.safety) / len(rows)
    sample = train_set[0]["prompt"] + train_set[0]["chosen"]
    largest = training.longest_pairs(tokenizer, train_set, config.safety.batch_size)
    training.describe(stage, sample, pairs, len(rows), passes, largest, args.dry_run)
    machine.check_disk(stage.output, 1.0)
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
    from trl import DPOConfig, DPOTrainer

    def make_trainer(stage):
        weight = stage.section.sft_weight
        trainer = DPOTrainer(
            model=training.load_model(stage),
            # No ref_model: TRL then freezes a copy of the adapter it is given as the reference.
            args=DPOConfig(
                **training.trainer_arguments(stage),
                beta=stage.section.beta,
                loss_type=["sigmoid", "sft"] if weight else ["sigmoid"],
                loss_weights=[1.0, weight] if weight else None,
            ),
            train_dataset=Dataset.from_list(train_set),
            eval_dataset=Dataset.from_list(eval_set),
            processing_class=tokenizer,
            callbacks=training.callbacks(stage),
        )
        return trainer, training.pair_counts(stage, trainer.train_dataset)

    trainer, metrics = training.run(stage, make_trainer)

    # 4. Results
    training.finish(stage, trainer, tokenizer, metrics)
    print(
        f"wrote {stage.output}\nnext: python compress_model.py --input {stage.output} "
        f"--output liteguard_{config.model_type}.task"
    )


if __name__ == "__main__":
    cli.run(main)
