"""Stage 1, domain adaptation: QLoRA on plain medical text.

    python train_domain.py --model_type smollm2
    python train_domain.py --model microsoft/phi-2 --rank 32
    python train_domain.py --model_type phi2 --set domain.batch_size=1 --dry_run

Reads data/<model_type>/domain, trains a LoRA adapter on every attention and FFN layer of the base
model held in NF4, and writes domain_checkpoint/ (adapter, tokenizer, curves.png, stage.json).
The same command resumes interrupted work and reuses a finished result.
"""

from __future__ import annotations

from pathlib import Path

from liteguard import cli, models
from liteguard.export import possible
from liteguard.training import arguments, callbacks, loop, tokens
from liteguard.training.feed import describe_feed, make_feed, require_disk
from liteguard.training.stage import finish, load_model, load_tokenizer, plan


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--rank", type=int, metavar="R", help="LoRA rank (domain.lora_rank)")
    parser.add_argument("--data", metavar="DIR", help="default: data/<model_type>")
    parser.add_argument("--output", metavar="DIR", default="domain_checkpoint")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    flags = {"--rank": ("domain.lora_rank", args.rank)}
    config = models.with_base_prompt(cli.resolve_config(args, flags))
    cli.print_config(config, "model", "domain")

    # 2. Inputs
    stage = plan(
        "domain",
        config,
        output=Path(args.output),
        data_dir=Path(args.data or f"data/{config.model_type}"),
        overwrite=args.overwrite,
        flags=cli.config_flags(args),
    )
    tokenizer = load_tokenizer(stage)
    possible.require(stage, tokenizer)
    train_set, eval_set = (
        tokens.documents(tokenizer, stage.data_dir, split, config)
        for split in ("train", "validation")
    )
    eval_set = eval_set.first(config.domain.max_eval_rows)
    describe_feed(stage, tokenizer, train_set, eval_set, args.dry_run)
    require_disk(stage, args.overwrite)
    if args.dry_run:
        load_model(stage)
        print("dry run: nothing written")
        return
    following = cli.next_line(
        "train_instruction.py", "--checkpoint", stage.output, *cli.own_flags(args)
    )
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
