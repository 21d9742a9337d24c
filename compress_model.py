"""Turn the final checkpoint into a bundle for a phone, and prove that it answers like its model.

    python compress_model.py --input final_checkpoint --output liteguard_phi2.task
    python compress_model.py --input final_checkpoint --output liteguard_phi2.task --only task
    python compress_model.py --input final_checkpoint --quantize mixed --verify full
    python compress_model.py --input final_checkpoint --output liteguard_phi2.task --also gguf
    python compress_model.py --input final_checkpoint --output liteguard_phi2.task --dry_run

Merges the adapter into the 16-bit base model on the CPU, converts to TFLite and quantises it
(litert-torch, in child processes), makes the tokenizer, and bundles all as a .task
(SentencePiece with the same token ids) and a LiteRT-LM .litertlm (the original tokenizer), or as
the one that --only names. Then it opens them in LiteRT-LM and compares the one of --output with the
merged model on held-out rows: token ids, perplexity, answers, where they stop, who is refused. The
first step that leaves its tolerance is named, and only bundles that pass get their names. An
interrupted run goes on where it was.

Writes NAME.task and NAME.litertlm, a record beside each (NAME.task.json), what an app needs to know
(NAME.deploy.json: prompt, stop tokens, lengths, sha256, licence) and an entry for AI Edge Gallery
(NAME.gallery.json). With --also gguf NAME.gguf as well, for llama.cpp and Ollama: the same merged
model with 8-bit weights, which the proof of the bundle says nothing about.
"""

from __future__ import annotations

import time
from pathlib import Path

from liteguard import checkpoints, cli, shown
from liteguard.config import RECIPES


def parse_args():
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("--input", metavar="DIR", required=True, help="a final checkpoint")
    whole = "its container is compared whole, of the other one the form"
    add("--output", metavar="FILE", help=f"default: liteguard_<model_type>.task; {whole}")
    add("--only", choices=("task", "litertlm"), help="write one container; default: both")
    kinds = "gguf: NAME.gguf, for llama.cpp and Ollama; both: both containers, the default now"
    add("--also", nargs="?", const="both", choices=("both", "gguf"), help=kinds)
    recipes = f"auto, or one or several (the first that passes its proof) of {', '.join(RECIPES)}"
    recipes += "; default: compress.quantize of the YAML"
    add("--quantize", metavar="RECIPE", help=recipes)
    most = "the most that the weights may take: compress.size_gb"
    add("--size", metavar="2.0GB", type=cli.gigabytes, help=most)
    levels = "quick, full or none; default: compress.verify.level"
    add("--verify", metavar="LEVEL", help=levels)
    args = parser.parse_args()
    if args.only and args.also == "both":
        parser.error("argument --also: not allowed with argument --only")
    return args


def main() -> None:
    # 1. Configuration
    args = parse_args()
    started = time.time()
    source = Path(args.input)
    record = checkpoints.read_stage(source, "safety")
    flags = {
        "--quantize": ("compress.quantize", args.quantize),
        "--size": ("compress.size_gb", args.size),
        "--verify": ("compress.verify.level", args.verify),
    }
    config = cli.resolve_config(args, flags, parent=record)
    cli.print_config(config, "model", "compress")

    # 2. Inputs
    from liteguard.export import apps, compression, gguf_file, outputs, verify

    name = args.output or f"liteguard_{config.model_type}.{args.only or 'task'}"
    work = compression.plan(
        config, source, record, outputs.containers(Path(name), args.only), args.also == "gguf"
    )
    if args.dry_run:
        work.require_resources()
        print(f"would {work}\ndry run: nothing written")
        return
    output, inputs = work.bundles[0], work.inputs
    following = cli.next_line("evaluate_model.py", "--bundle", output, *cli.own_flags(args))
    published = outputs.finish_publishing(output, inputs)
    if published or (not args.overwrite and outputs.reuse(work.bundles, inputs)):
        print(f"{output} is finished and was made from the same inputs: reused")
        if work.gguf:
            gguf_file.beside(work.gguf, config, work.base, work.revision, source)
        print(following)
        return
    work.require_resources()
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = outputs.start_work(output, inputs, args.overwrite)

    # 3. Work
    result = work.run(folder, started)

    # 4. Results
    outputs.publish(folder, work.bundles, result, apps.deployment(result), apps.gallery(result))
    for path in work.bundles:
        print(f"wrote {path} ({shown.size(result.bytes[path.name])}) and {path.name}.json")
    print(f"{verify.closing(result.to_dict())}; {shown.duration(result.wall_s)}")
    if work.gguf:
        gguf_file.beside(work.gguf, config, work.base, work.revision, source)
    print(following)


if __name__ == "__main__":
    cli.run(main)
