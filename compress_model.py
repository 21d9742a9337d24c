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

from liteguard import checkpoints, cli, models, shown
from liteguard.config import RECIPES, flatten
from liteguard.errors import UserError
from liteguard.records import BundleRecord


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--input", metavar="DIR", required=True, help="a final checkpoint")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: liteguard_<model_type>.task; its container is compared whole, of the other "
        "one the form",
    )
    parser.add_argument(
        "--only", choices=("task", "litertlm"), help="write one container; default: both"
    )
    parser.add_argument(
        "--also",
        nargs="?",
        const="both",
        choices=("both", "gguf"),
        help="gguf: NAME.gguf, for llama.cpp and Ollama; both: both containers, the default now",
    )
    parser.add_argument(
        "--quantize",
        metavar="RECIPE",
        help=f"auto, or one or several (the first that passes its proof) of {', '.join(RECIPES)}; "
        "default: compress.quantize of the YAML",
    )
    parser.add_argument(
        "--size",
        metavar="2.0GB",
        type=cli.gigabytes,
        help="the most that the weights may take: compress.size_gb",
    )
    parser.add_argument(
        "--verify", metavar="LEVEL", help="quick, full or none; default: compress.verify.level"
    )
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
    section = config.compress
    cli.print_config(config, "model", "compress")

    # 2. Inputs
    from liteguard.export import (
        apps,
        gguf_file,
        measured,
        outputs,
        possible,
        quantization,
        tflite,
        verify,
    )
    from liteguard.export.conversion import Conversion

    name = args.output or f"liteguard_{config.model_type}.{args.only or 'task'}"
    wanted = outputs.containers(Path(name), args.only)
    base, revision, architecture = models.model_config(config)
    identity = models.base_identity(base, revision)
    checkpoints.require_same(source, record, config.prompt, identity, config.model.name)
    own, data_dir = models.load_base_tokenizer(config), Path(record.data_dir)
    can = possible.possible(config, architecture, own, base, data_dir)
    bundles = [path for path in wanted if not can.why_not(path.suffix)]
    if not bundles:
        raise UserError(f"{source}: {can}. Name an --output that can be made.")
    print(can)
    output = bundles[0]
    outputs.check(bundles)
    gguf = output.with_suffix(".gguf") if args.also == "gguf" else None
    if gguf:
        gguf_file.check(gguf, architecture, own)
    samples = None
    if section.verify.level != "none":
        samples = measured.collect_samples(config, data_dir, own.backend_tokenizer)
    inputs = {
        "adapter": record.adapter,
        "base": identity,
        "prompt": record.prompt.model_dump(),
        **flatten(section.model_dump(exclude={"python"}), "compress."),
        "compress.prefill_lengths": section.ladder,
    }
    converter = tflite.choose_converter(section.converter, section.python)
    parameters = models.count_parameters(architecture)
    recipes = quantization.recipes_for(section, architecture)
    memory, _ = tflite.required_resources(parameters, converter)
    disk = tflite.whole_disk(parameters, converter, recipes[0], len(bundles))
    print(
        f"prefill lengths: {', '.join(map(str, section.ladder))}; KV cache: "
        f"{section.kv_cache_length} tokens\n"
        f"expected peak memory: {tflite.peak_memory(parameters, converter) / 1e9:.1f} GB; "
        f"{memory / 1e9:.1f} GB must be free, and {shown.size(disk)} of disk"
    )
    needed = parameters, converter, output.parent, disk - checkpoints.left_over(output)
    if args.dry_run:
        tflite.require_resources(*needed)
        files = [*bundles, gguf] if gguf else bundles
        print(
            f"would merge, convert ({converter}, {' then '.join(recipes)}) and write "
            f"{', '.join(map(str, files))}; proof: {section.verify.level}\n"
            "dry run: nothing written"
        )
        return
    merged = config, base, revision, source
    following = cli.next_line("evaluate_model.py", "--bundle", output, *cli.own_flags(args))
    published = outputs.finish_publishing(output, inputs)
    if published or (not args.overwrite and outputs.reuse(bundles, inputs)):
        print(f"{output} is finished and was made from the same inputs: reused")
        if gguf:
            gguf_file.beside(gguf, *merged)
        print(following)
        return
    tflite.require_resources(*needed)
    output.parent.mkdir(parents=True, exist_ok=True)
    work = outputs.start_work(output, inputs, args.overwrite)

    # 3. Work
    conversion = Conversion(
        config, source, base, revision, parameters, converter, recipes, bundles, samples, work
    )
    facts = conversion.run()

    # 4. Results
    result = BundleRecord(
        stage="bundle",
        base_model=config.model.name,
        base_revision=revision,
        base_identity=identity,
        base_licence=config.model.licence,
        parent=str(source),
        parent_adapter_sha256=record.adapter,
        data_dir=record.data_dir,
        prompt=config.prompt,
        config=config.model_dump(),
        inputs=inputs,
        files={path.name: checkpoints.sha256_file(work / path.name) for path in bundles},
        bytes={path.name: (work / path.name).stat().st_size for path in bundles},
        **facts,
        timings_s=conversion.steps.timings,
        wall_s=round(time.time() - started, 1),
        peak_rss_gb=conversion.steps.peaks,
    )
    outputs.publish(work, bundles, result, apps.deployment(result), apps.gallery(result))
    for path in bundles:
        print(f"wrote {path} ({shown.size(result.bytes[path.name])}) and {path.name}.json")
    print(f"{verify.closing(facts)}; {shown.duration(result.wall_s)}")
    if gguf:
        gguf_file.beside(gguf, *merged)
    print(following)


if __name__ == "__main__":
    cli.run(main)
