"""How many texts have the same token ids on the device as in training, and why the others do not.

    python benchmarks/bench_tokenizer.py --data data/smollm2 --json tokenizer_report.json

Converts SmolLM2's own tokenizer and a Phi-like one (GPT-2's vocabulary and merges with Phi's runs
of blanks) to SentencePiece and tokenizes held-out texts of prepared data, every special token,
texts full of symbols, and the questions of public benchmarks as they were published (not cleaned
by LiteGuard) with both.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import phi_like
import tokenizers

from liteguard import cli, models
from liteguard.config import build
from liteguard.embedded import public_benchmarks
from liteguard.errors import UserError
from liteguard.export import tokenizer, verify
from liteguard.rows import FIELDS, load_split


def held_out(data: Path) -> list[str]:
    """Every text, question and answer of the test splits, once."""
    texts = []
    for part, fields in FIELDS.items():
        for row in load_split(data, part, "test"):
            texts += [row[field] for field in fields if field in row]
    return list(dict.fromkeys(texts))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="prepared data")
    parser.add_argument("--cache_dir", metavar="DIR", default=".cache")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    cache = Path(args.cache_dir)
    texts = held_out(Path(args.data))
    if len(texts) < 2000:
        raise UserError(f"{args.data} has {len(texts)} held-out texts; at least 2,000 are needed")
    public = [
        question.question
        for name in public_benchmarks.HELD_OUT
        for question in public_benchmarks.load(name, cache)
    ]
    default = build(
        [
            (
                "",
                {
                    "data": {"cache_dir": str(cache)},
                    "model": {"name": "embedded:smollm2-135m-instruct"},
                },
            )
        ]
    )
    report = {}
    with tempfile.TemporaryDirectory() as folder:
        phi = Path(folder) / "phi"
        phi.mkdir()
        phi_like.write_tokenizer(phi, cache)
        for name, directory in (
            ("SmolLM2", Path(models.base_model(default)[0])),
            ("Phi-like", phi),
        ):
            model = Path(folder) / f"{name}.model"
            made = tokenizer.build_sentencepiece(directory, model)
            original = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
            special = [t.content for t in original.get_added_tokens_decoder().values()]
            report[name] = {
                what: tokenizer.compare_tokenizers(directory, model, chosen, made.replaced)
                for what, chosen in (
                    ("held-out texts", texts),
                    ("special tokens", special),
                    ("symbols", list(verify.PROBES)),
                    ("benchmarks as published", public),
                )
            }
    print(f"{'tokenizer':10} {'texts':24} {'count':>7}  same ids   causes of the others")
    for name, found in report.items():
        for what, result in found.items():
            causes = ", ".join(f"{cause} {count}" for cause, count in result["causes"].items())
            print(
                f"{name:10} {what:24} {result['texts']:7,}  {result['identical']:8.3%}   {causes}"
            )
    if args.json:
        for found in report.values():
            for result in found.values():
                del result["examples"]
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
