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

from liteguard import checkpoints, cli
from liteguard.export import possible
from liteguard.rows import load_split, read_manifest, source_titles
from liteguard.training import arguments, callbacks, feed, loop, tokens
from liteguard.training.stage import finish, load_model, load_tokenizer, longest_pairs, plan


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--checkpoint", metavar="DIR", required=True, help="an instruction checkpoint"
    )
    parser.add_argument("--data", metavar="DIR", help="default: the data of the checkpoint")
    parser.add_argument("--output", metavar="DIR", default="final_checkpoint")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    parent = checkpoints.read_stage(Path(args.checkpoint), "instruction")
    config = cli.resolve_config(args, parent=parent)
    cli.print_config(config, "model", "safety")

    # 2. Inputs
    stage = plan(
        "safety",
        config,
        output=Path(args.output),
        data_dir=Path(args.data or parent.data_dir),
        parent=Path(args.checkpoint),
        flags=cli.config_flags(args),
    )
    tokenizer = load_tokenizer(stage)
    possible.require(stage, tokenizer)
    rows = load_split(stage.data_dir, "preference", "train")
    held_out = load_split(stage.data_dir, "preference", "validation")
    mixture = (
        tokens.kind_weights(config.safety, rows),
        source_titles(read_manifest(stage.data_dir), "preference"),
    )
    train_set = tokens.render_preferences(
        tokenizer, rows, config, "train", feed.needed_rows(config.safety), *mixture
    )
    eval_set = tokens.render_preferences(
        tokenizer, held_out, config, "validation", config.safety.max_eval_rows, *mixture
    )
    pairs = f"{config.safety.batch_size} x {config.safety.gradient_accumulation} pairs"
    passes = feed.needed_rows(config.safety) / len(rows)
    sample = train_set[0]["prompt"] + train_set[0]["chosen"]
    largest = longest_pairs(tokenizer, train_set, config.safety.batch_size)
    feed.describe(stage, sample, pairs, len(rows), passes, largest, args.dry_run)
    feed.require_disk(stage, args.overwrite)
    if args.dry_run:
        load_model(stage)
        print("dry run: nothing written")
        return
    bundle = f"liteguard_{config.model_type}.task"
    following = cli.next_line(
        "compress_model.py", "--input", stage.output, "--output", bundle, *cli.own_flags(args)
    )
    run = stage.open(args.overwrite)
    if run is None:
        print(following)
        return

    # 3. Work
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def make_trainer(stage):
        trainer = DPOTrainer(
            model=load_model(stage),
            # No ref_model: TRL then freezes a copy of the adapter it is given as the reference.
            args=DPOConfig(
                **arguments.trainer_arguments(stage),
                **arguments.preference_losses(stage.section),
            ),
            train_dataset=Dataset.from_list(train_set),
            eval_dataset=Dataset.from_list(eval_set),
            processing_class=tokenizer,
            callbacks=callbacks.stage_callbacks(stage),
        )
        return trainer, feed.pair_counts(stage, trainer.train_dataset)

    trainer, metrics = loop.run(run, make_trainer)

    # 4. Results
    print(f"{finish(run, trainer, tokenizer, metrics)}\n{following}")


if __name__ == "__main__":
    cli.run(main)
