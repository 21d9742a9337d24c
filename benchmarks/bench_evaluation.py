"""Tokens per second of evaluation: batches against one by one, worker processes against one.

    python benchmarks/bench_evaluation.py --data demo/data
    python benchmarks/bench_evaluation.py --data demo/data --checkpoint demo/final_checkpoint \\
        --bundle demo/liteguard_smollm2.task --json bench.json

Same prompts and texts in every row of the table, on the embedded base model or a checkpoint, and
on a bundle if one is given. `generate` is Transformers' own batched generation, one batch at a
time, in which a row is computed until the last one of its batch has ended. `same` counts answers
equal to the first row's (floating-point sums depend on the batch, so that ties may fall the other
way). The start of the bundle's processes counts: give it enough prompts.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteguard import checkpoints, cli
from liteguard.config import build, read_yaml
from liteguard.evaluation import answerers, held_out, knowledge
from liteguard.runtime.bundle import Answer
from liteguard.runtime.workers import BundleWorkers


def transformers_generate(model: answerers.Checkpoint, prompts: list[str], limit: int) -> Any:
    """(index, Generated) by `model.generate` in length-sorted batches."""
    import torch

    model.tokenizer.padding_side = "left"
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), model.batch_size):
        part = order[start : start + model.batch_size]
        batch = model.tokenizer(
            [prompts[i] for i in part], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.model.device)
        with torch.inference_mode():
            output = model.model.generate(
                **batch,
                max_new_tokens=limit,
                do_sample=False,
                eos_token_id=model.stop_ids,
                pad_token_id=model.tokenizer.pad_token_id,
            )
        for index, ids in zip(part, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
            ends = [ids.index(stop) for stop in model.stop_ids if stop in ids]
            kept = ids[: min(ends)] if ends else ids
            text = model.tokenizer.decode(kept, skip_special_tokens=True).strip()
            yield index, answerers.Generated(text, len(kept) + bool(ends), bool(ends))


class Bench:
    """Rows of the table; a row's ratio is against the first of its group."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        print(f"{'':34}{'tokens':>8}{'s':>8}{'tokens/s':>10}{'ratio':>8}{'same':>10}")

    def run(self, group: str, name: str, results: Callable[[], Iterator[tuple[int, Any]]]) -> None:
        """Times one way and compares what it gives with the first way of the group."""
        begin = time.perf_counter()
        found = dict(results())
        seconds = time.perf_counter() - begin
        answers = isinstance(found[0], answerers.Generated | Answer)
        tokens = sum(r.tokens if answers else r[1] for r in found.values())
        values = [
            found[i].text.strip() if answers else round(found[i][0] / found[i][1], 3)
            for i in range(len(found))
        ]
        row = {"group": group, "name": name, "tokens": tokens, "seconds": round(seconds, 2)}
        row["tokens_per_s"] = round(tokens / seconds, 1)
        first = next((r for r in self.rows if r["group"] == group), {**row, "values": values})
        row["ratio"] = round(row["tokens_per_s"] / first["tokens_per_s"], 2)
        same = sum(a == b for a, b in zip(values, first["values"], strict=True))
        row |= {"same": same, "of": len(values), "values": values}
        self.rows.append(row)
        print(
            f"{group + ', ' + name:34}{tokens:8}{seconds:8.1f}{row['tokens_per_s']:10.1f}"
            f"{row['ratio']:7.2f}x{f'{same}/{len(values)}':>10}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", default="configs/smollm2-135m.yaml")
    parser.add_argument("--data", default="demo/data", help="prepared data: where prompts are from")
    parser.add_argument("--cache_dir", help="default: data.cache_dir of the YAML")
    parser.add_argument("--checkpoint", help="default: the base model")
    parser.add_argument("--bundle")
    parser.add_argument("--only_bundle", action="store_true")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--questions", type=int, default=4, help="of each public benchmark")
    parser.add_argument("--max_new_tokens", type=int, default=40)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8, 24])
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    values = read_yaml(Path(args.config))
    layers = [(args.config, values)]
    if args.cache_dir:
        layers.append(("--cache_dir", {"data": {"cache_dir": args.cache_dir}}))
    own = build(layers)
    rows = held_out.held_out(own, Path(args.data))
    asked = [row for _, row in held_out.requests(rows)]
    # Every third or so: questions of all sets, and so of all lengths.
    step = max(1, len(asked) // args.prompts)
    prompts = [own.prompt.render_question(r["prompt"]) for r in asked[::step]][: args.prompts]
    pairs = held_out.text_pairs(own, rows)[: args.texts]
    options = knowledge.pairs(knowledge.rows(Path(own.data.cache_dir), args.questions))
    limit, bench = args.max_new_tokens, Bench()

    if not args.only_bundle:
        model = answerers.Checkpoint(own, Path(args.checkpoint) if args.checkpoint else None)
        lanes, model.lanes, model.batch_size = model.lanes, 1, 1
        list(model.generate(prompts[:1], 4))  # the first call sets things up
        bench.run("answers", "one by one", lambda: model.generate(prompts, limit))
        model.lanes = lanes
        for size in args.batch_size:
            model.batch_size = size
            name = f"batches of {size}"
            bench.run("answers", name, lambda: model.generate(prompts, limit))
            bench.run(
                "answers",
                f"generate, {name}",
                lambda: transformers_generate(model, prompts, limit),
            )
        bench.run("texts", "one by one", lambda: one_by_one(model, pairs))
        bench.run("texts", "batches", lambda: model.score(pairs))
        if options:
            bench.run("options", "one by one", lambda: one_by_one(model, options))
            bench.run("options", "context once", lambda: model.score(options))
        del model
    if args.bundle:
        for workers, threads in ((1, 2), (2, 1)):
            name = f"{workers} process{'es' * (workers > 1)}, {threads} thread{'s' * (threads > 1)}"
            found = BundleWorkers(Path(args.bundle), workers=workers, threads=threads)
            bench.run("bundle", name, lambda: found.generate(prompts, limit))  # noqa: B023
            bench.run("bundle texts", name, lambda: found.score(pairs))  # noqa: B023
            print(f"{'':34}peak memory of the workers {found.peak_rss_gb:.2f} GB")
    if args.json:
        kept = [{k: v for k, v in row.items() if k != "values"} for row in bench.rows]
        checkpoints.write_json(Path(args.json), {"rows": kept})


def one_by_one(model: answerers.Checkpoint, pairs: list[tuple[str, str]]) -> Iterator[Any]:
    """`score` of each pair alone."""
    for index, pair in enumerate(pairs):
        yield index, next(iter(model.score([pair])))[1]


if __name__ == "__main__":
    cli.run(main)
