"""What the six scripts share at the command line: flags, exit codes, a quiet start."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from liteguard import checkpoints, distributed, failures, hub, machine, shown, writing
from liteguard.config import (
    OWN,
    Config,
    build,
    find_config,
    flatten,
    of_a_record,
    parse_setting,
    read_yaml,
)
from liteguard.errors import UserError
from liteguard.records import Made


class _Parser(argparse.ArgumentParser):
    """Prints what it cannot read as every other message."""

    def error(self, message: str) -> NoReturn:
        super().error(shown.message(message))


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help is the script's docstring, with the flags all scripts take."""
    result = _Parser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    result.add_argument("--config", metavar="FILE", help="YAML to use (wins over the names)")
    result.add_argument(
        "--set",
        dest="settings",
        metavar="SECTION.KEY=VALUE",
        action="append",
        default=[],
        help="override one value; repeatable",
    )
    result.add_argument(
        "--dry_run", action="store_true", help="check everything, print it, do not do the work"
    )
    result.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an existing output, or start over when settings changed",
    )
    return result


def add_model_flags(result: argparse.ArgumentParser) -> None:
    """--model_type and --model, for the scripts that start from a base model."""
    result.add_argument("--model_type", metavar="NAME", help="smollm2, phi1_5, phi2, ...")
    result.add_argument("--model", metavar="ID", help="base model id, e.g. microsoft/phi-2")


def resolve_config(
    args: argparse.Namespace,
    flags: dict[str, tuple[str, Any]] | None = None,
    parent: Made | None = None,
) -> Config:
    """Config from the flags; `parent` is a stage.json whose config stands in for a YAML.

    A record may be somebody else's, so that only its description of what was made is taken.

    `flags` maps a flag to its 'section.key' and its value (None: not given).
    """
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if parent is not None and not args.config:
        described, own = of_a_record(parent.config)
        layers.append(("the parent's stage.json", described))
        # Where a stage reported to says nothing once it is trained, nor its sets where none are
        # measured.
        stages = [*checkpoints.STAGES]
        trained = stages[: stages.index(parent.stage) + 1 if parent.stage in stages else None]
        past = {f"{stage}.report_to" for stage in trained}
        past |= set() if hasattr(args, "sets") else {"evaluate.sets"}
        own = [name for name in own if name not in past]
        if own:
            print(
                f"not taken from the parent's record: {', '.join(own)} (of the machine that it was "
                "made on; give them with --config FILE or --set)"
            )
    else:
        path = find_config(
            getattr(args, "model_type", None), getattr(args, "model", None), args.config
        )
        layers.append((str(_relative(path)), read_yaml(path)))
    for flag, (name, value) in (flags or {}).items():
        if value is not None:
            layers.append((flag, parse_setting(f"{name}={value}")[1]))
    for setting in args.settings:
        layers.append(("--set", parse_setting(setting)[1]))
    if parent is not None:
        follow_stage(parent)
    config = build(layers)
    if parent is not None and config.prompt_from_base:
        # What was made has one, which was taken from its base.
        config = config.with_prompt(parent.prompt, "the parent's stage.json")
    if not getattr(args, "dry_run", True):
        _logs.append(Path(config.data.cache_dir) / "logs")
    return config


def follow_stage(record: Made) -> None:
    """Use the hub commit of the base model that a finished stage or bundle was made from."""
    model = record.config.get("model")
    asked = model.get("revision") if isinstance(model, dict) else None
    base = hub.Repository("model", record.base_model, asked if isinstance(asked, str) else None)
    hub.remember(base, record.base_revision)


def gigabytes(text: str) -> float:
    """GB (10^9 bytes) of "2.0GB", "900 MB" or "2"; raises what argparse shows for others."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([GM]B?)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write 2.0GB or 900MB")
    return float(found[1]) / (1000 if (found[2] or "G")[0] in "mM" else 1)


def config_flags(args: argparse.Namespace) -> list[str]:
    """The flags that name the configuration, as they were given, with every --set."""
    named = ((flag, getattr(args, flag, None)) for flag in ("config", "model_type", "model"))
    flags = next(([f"--{flag}", value] for flag, value in named if value), [])
    return [*flags, *_set(args.settings)]


def _set(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def own_flags(args: argparse.Namespace) -> list[str]:
    """What a step needs again although its parent's record stands in for the YAML.

    That is what is never taken from a record (OWN). A --config stands in for the record itself,
    and then every value that was laid upon it is needed, too.
    """
    if args.config:
        rank = getattr(args, "rank", None)
        laid = [*args.settings, *([f"domain.lora_rank={rank}"] if rank else [])]
        return ["--config", args.config, *_set(laid)]
    return _set([setting for setting in args.settings if _is_own(setting)])


def _is_own(setting: str) -> bool:
    name = setting.partition("=")[0].strip() + "."
    return any(name.startswith(f"{own}.") or f"{own}.".startswith(name) for own in OWN)


def next_line(script: str, *words: str | Path) -> str:
    """The command to run next, as it can be pasted into a shell."""
    return f"next: python {shlex.join([script, *map(str, words)])}"


def output_directory(name: str) -> Path:
    """The directory of that name, which need not exist. Raises UserError if it cannot be one."""
    path = Path(name)
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            raise UserError(f"{place} is a file, and a directory is needed there.")
    return path


def _relative(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def print_config(config: Config, *sections: str) -> None:
    """Print the sections a script uses, each value with where it came from."""
    values = flatten(config.model_dump(exclude={"data": {"domain", "instruction", "preference"}}))
    for name, value in values.items():
        if name.split(".")[0] in sections:
            origin = config.sources.get(name, "default")
            line = f"  {name:38} {_given(value)!r:42} {origin}"
            print(shown.visible(shown.without_passwords(line)))


def _given(value: Any) -> Any:
    """A value as a person would write it: entries of a list without what they do not set."""
    if not isinstance(value, list):
        return value
    return [
        {key: own for key, own in entry.items() if own not in (None, {})}
        if isinstance(entry, dict)
        else entry
        for entry in value
    ]


# Where `keep_heard` writes, once it is known.
_logs: list[Path] = []


def keep_heard() -> None:
    """Write what libraries warned of to logs/SCRIPT.log in the cache, for whoever looks for it."""
    if machine.heard and _logs and distributed.is_main():
        lines = [f"{count} x {text}\n" for text, count in machine.heard.items()]
        with contextlib.suppress(OSError):
            _logs[-1].mkdir(parents=True, exist_ok=True)
            writing.write_text(
                _logs[-1] / f"{Path(sys.argv[0]).stem}.log", "".join(lines), shared=True
            )


def run(main: Callable[[], None]) -> None:
    """Run a script's main(): one message and the right exit code instead of a traceback."""
    machine.quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal of ASCII only gets escapes for the rest.
            stream.reconfigure(errors="backslashreplace")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    distributed.quiet_unless_main()
    try:
        with contextlib.redirect_stdout(shown.screen(sys.stdout)):
            main()
        distributed.leave()
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        told = failures.explain(error)
        if told is None:
            raise
        # A second Ctrl-C, or output that nobody reads, must not turn the end into a traceback.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # Every process says it: the launcher ends the others as soon as one has ended.
        place = "" if distributed.is_main() else f" in process {distributed.rank()}"
        with contextlib.suppress(OSError):
            text = told[0].replace("error:", f"error{place}:", 1)
            print(f"\n{shown.message(text)}", file=sys.stderr)
        sys.exit(told[1])
    finally:
        keep_heard()
