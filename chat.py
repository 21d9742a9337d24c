"""Talk to a stage, the base model or a bundle: in the terminal, on a local page, or by an API.

    python chat.py final_checkpoint
    python chat.py base final_checkpoint liteguard_phi2.task
    python chat.py liteguard_phi2.task --temperature 0.7 --top_k 40 --seed 1
    python chat.py final_checkpoint --system "Answer in one sentence."
    python chat.py base final_checkpoint --single < questions.txt
    python chat.py base liteguard_phi2.task --web
    python chat.py liteguard_phi2.task --serve --port 8000

Several models get every question, each in a conversation of its own; `base` is the base model of
the first one (or of --config, --model_type, --model). Under each answer stands what the refusal
judge of the evaluation says of it. Greedy answers, the default, are those that evaluate_model.py
measures. In the terminal: /reset, /system TEXT, /save FILE, /help; Ctrl-C stops an answer, a second
one leaves. From a pipe every line is a question.

--web opens a page, --serve an OpenAI-compatible API (/v1/chat/completions, /v1/models), both on
127.0.0.1 only. What they say is not medical advice.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from liteguard import checkpoints, cli, machine
from liteguard.errors import UserError
from liteguard.records import BundleRecord, Made

BASE = "base"


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="a stage, a .task or .litertlm file, or `base`")
    add("--system", metavar="TEXT", help="system message instead of the prompt's own")
    add("--max_new_tokens", metavar="N", type=int, help="default: evaluate.max_new_tokens")
    add("--temperature", type=float, help="0 is greedy (default; 1 with --top_k or --top_p)")
    add("--top_k", type=int, help="draw from the K likeliest tokens")
    add("--top_p", type=float, help="draw from the likeliest tokens of this probability together")
    add("--seed", type=int, help="the same seed draws the same answer")
    add("--single", action="store_true", help="every question starts a new conversation")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--web", action="store_true", help="a page in the browser, and the API")
    how.add_argument("--serve", action="store_true", help="the API alone")
    add("--port", type=int, default=8080, help="of --web and --serve; 0 takes a free one")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    from liteguard.sampling import Sampling

    sampling = Sampling.of(args.temperature, args.top_k, args.top_p, args.seed)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens {args.max_new_tokens}: at least 1")
    if len(set(args.models)) < len(args.models):
        raise UserError(f"{' '.join(args.models)}: name every model once.")
    records: dict[str, Made] = {}
    for name in args.models:
        if name.endswith((".task", ".litertlm")):
            records[name] = checkpoints.read_bundle(Path(name))
        elif name != BASE:
            records[name] = checkpoints.read_stage(Path(name))
    first = next(iter(records.values()), None)
    named = args.config or args.model_type or args.model
    if first is None and not named:
        raise UserError("base of which model? Name a stage or a bundle too, or --model_type NAME.")

    # 2. Inputs
    from liteguard import models
    from liteguard.chat import speakers
    from liteguard.runtime import container

    targets, needed = [], 0
    for name in args.models:
        record = records.get(name)
        own = record or (None if named else first)
        config = models.with_base_prompt(cli.resolve_config(args, parent=own))
        short = name if name == BASE else Path(name).name
        if [Path(other).name for other in args.models].count(short) > 1:
            short = name
        path = None if record is None else Path(name)
        target = speakers.Target(short, path, config, record)
        architecture = None
        if not target.is_bundle:
            directory, commit, architecture = models.model_config(config)
            if record is not None and path is not None:
                identity = models.base_identity(directory, commit)
                checkpoints.require_same(path, record, config.prompt, identity, config.model.name)
        if isinstance(record, BundleRecord):
            container.require_disk(Path(name), record.quantize.get("recipe", ""), scores=False)
        targets.append(target)
        needed += speakers.expected_memory(target, architecture)
    limit = args.max_new_tokens or targets[0].config.evaluate.max_new_tokens
    names = ", ".join(target.name for target in targets)
    print(f"{names}: {sampling}, at most {limit} tokens an answer; {needed / 1e9:.1f} GB of memory")
    machine.require_memory(needed, "talking to them", "; name fewer models.")
    if args.dry_run:
        print("dry run: nothing loaded")
        return

    # 3. Work
    from liteguard.chat import server, terminal
    from liteguard.chat.conversation import Conversation

    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(speakers.open_speaker(target)) for target in targets]
        if args.web or args.serve:
            server.serve(opened, limit, sampling, args.system, args.port, page=args.web)
            return
        print("Not medical advice. /help lists commands; Ctrl-C stops an answer.\n")
        conversations = [Conversation(own, limit, sampling, args.system) for own in opened]
        terminal.Terminal(conversations, args.single, args.overwrite).run()


if __name__ == "__main__":
    cli.run(main)
