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

from liteguard import checkpoints, cli
from liteguard.export import possible
from liteguard.training import arguments, callbacks, loop, tokens
from liteguard.training.feed import describe_feed, make_feed, needed_rows, require_disk
from liteguard.training.stage import finish, load_model, load_tokenizer, plan


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--checkpoint", metavar="DIR", required=True, help="a domain checkpoint")
    parser.add_argument("--data", metavar="DIR", help="default: the data of the checkpoint")
    parser.add_argument("--output", metavar="DIR", default="instruction_checkpoint")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    parent = checkpoints.read_stage(Path(args.checkpoint), "domain")
    config = cli.resolve_config(args, parent=parent)
    cli.print_config(config, "model", "instruction")

    # 2. Inputs
    stage = plan(
        "instruction",
        config,
        output=Path(args.output),
        data_dir=Path(args.data or parent.data_dir),
        parent=Path(args.checkpoint),
        flags=cli.config_flags(args),
    )
    tokenizer = load_tokenizer(stage)
    possible.require(stage, tokenizer)
    train_set, eval_set = (
        tokens.answers(tokenizer, stage.data_dir, split, config, limit)
        for split, limit in (
            ("train", needed_rows(config.instruction)),
            ("validation", config.instruction.max_eval_rows),
        )
    )
    describe_feed(stage, tokenizer, train_set, eval_set, args.dry_run)
    require_disk(stage, args.overwrite)
    if args.dry_run:
        load_model(stage)
        print("dry run: nothing written")
        return
    following = cli.next_line("train_safety.py", "--checkpoint", stage.output, *cli.own_flags(args))
    run = stage.open(args.overwrite)
    if run is None:
        print(following)
        return

    # 3. Work
    from trl import SFTConfig, SFTTrainer

    def make_trainer(stage):
        feed = make_feed(stage, tokenizer, train_set, eval_set)
        trainer = SFTTrainer(
            model=load_model(stage),
            args=SFTConfig(**arguments.trainer_arguments(stage) | feed.arguments()),
            train_dataset=feed.train,
            eval_dataset=feed.evaluation,
            data_collator=feed.collator,
            processing_class=tokenizer,
            callbacks=callbacks.stage_callbacks(stage),
        )
        return trainer, feed.counts

    trainer, metrics = loop.run(run, make_trainer)

    # 4. Results
    print(f"{finish(run, trainer, tokenizer, metrics)}\n{following}")


if __name__ == "__main__":
    cli.run(main)
