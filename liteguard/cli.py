"""What the six scripts share at the command line: flags, exit codes, a quiet start."""

from __future__ import annotations

import argparse
import errno
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from liteguard import distributed, hub, machine
from liteguard.config import Config
from liteguard.config_layers import build, find_config, flatten, parse_setting, read_yaml
from liteguard.errors import LiteGuardError, UserError


def parser(doc: str) -> argparse.ArgumentParser:
    """An argument parser whose help is the script's docstring, with the flags all scripts take."""
    result = argparse.ArgumentParser(
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
    parent: dict[str, Any] | None = None,
) -> Config:
    """Config from the flags; `parent` is a stage.json whose config stands in for a YAML.

    `flags` maps a flag to its 'section.key' and its value (None: not given).
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if parent is not None and not args.config:
        layers.append(("the parent's stage.json", parent["config"]))
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
    return build(layers)


def follow_stage(record: dict[str, Any]) -> None:
    """Use the hub commit of the base model that a finished stage or bundle was made from."""
    model = record["config"]["model"]
    base = hub.Repository("model", model["name"], model["revision"])
    hub.remember(base, record.get("base_revision"))


def model_flags(args: argparse.Namespace) -> str:
    """The flags that name the model, as they were given, for the command to run next."""
    for flag in ("config", "model_type", "model"):
        if value := getattr(args, flag, None):
            return f"--{flag} {shlex.quote(value)}"
    return ""


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
            print(f"  {name:38} {value!r:42} {origin}")


def run(main: Callable[[], None]) -> None:
    """Run a script's main(): one message and the right exit code instead of a traceback."""
    machine.quiet_libraries()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(line_buffering=True)
    distributed.quiet_unless_main()
    try:
        main()
    except LiteGuardError as error:
        # Every process says it: the launcher ends the others as soon as one has ended.
        place = "" if distributed.is_main() else f" in process {distributed.rank()}"
        print(f"\nerror{place}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _is_write_failure(error):
            if not _is_of_a_file(error):
                raise
            print(
                f"\nerror: {error.filename}: {error.strerror}.\nCheck that the file is there and "
                "may be read and written, then run the same command again.",
                file=sys.stderr,
            )
            sys.exit(1)
        print(
            f"\nerror: cannot write: {error}\nNothing was left under a final name. Free space or "
            "fix the permissions, then run the same command again.",
            file=sys.stderr,
        )
        sys.exit(1)


def _is_of_a_file(error: BaseException) -> bool:
    """Whether the system refused a file for another reason than space: a mistake of no program."""
    return isinstance(error, OSError) and bool(error.filename and error.strerror)


def _is_write_failure(error: BaseException) -> bool:
    """Whether an error is a full disk, a quota, or a file system that cannot be written to.

    safetensors and torch raise classes of their own, with the system's words in the message.
    """
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    # What torch.save says instead of the system's error.
    words = ("PytorchStreamWriter", "iostream error", "inline_container.cc")
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in codes:
            return True
        text = str(seen)
        if any(f"os error {code})" in text for code in codes) or any(w in text for w in words):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
