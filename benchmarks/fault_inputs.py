"""Bad inputs for fault_matrix.py: from the settings' schema, from the records, and as files.

What a setting, a record or a file may not be is derived, not listed: every field of the schema gets
values of other types, every field of a record is dropped or replaced. A field that nothing depends
on may be anything; then the script has to work or to refuse, never to end in a traceback.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from tiny_world import ROOT, Done, run

from liteguard import cli, failures
from liteguard.config.config import Config

if TYPE_CHECKING:
    from fault_matrix import Tally, World

NOBODY = 65534
HEAD = f"extends: {ROOT / 'configs/phi-2.yaml'}\n"


def nobody() -> None:
    """Give up root's power over files."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)


def all_inputs(world: World, tally: Tally) -> None:
    settings(world, tally)
    records(world, tally)
    places(world, tally)
    contents(world, tally)


# --- settings -------------------------------------------------------------------------------------
def fields(model: type[BaseModel], above: str = "") -> Iterator[tuple[str, Any]]:
    """('section.key', its type) of every setting below a section."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}", kind


def wrong_values(kind: Any) -> list[str]:
    """YAML of values that a setting of this type cannot have."""
    if typing.get_origin(kind) is typing.Annotated:
        return wrong_values(typing.get_args(kind)[0])
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    origins = {typing.get_origin(option) or option for option in options}
    values = []
    if str not in origins and typing.Literal not in origins:
        values += ["no_such_value", "'\\\\udcff'"]
    if typing.Literal in origins and str not in origins:
        values += ["no_such_value", "7.5"]
    if dict not in origins and not any(
        isinstance(o, type) and issubclass(o, BaseModel) for o in origins
    ):
        values += ["{a: 1}"]
    if list not in origins:
        values += ["[[1]]"]
    if bool not in origins:
        values += ["true"]
    if origins & {int, float}:
        values += [".nan", ".inf", "1.0e300", "-1.0e300", "1e300", "9" * 400]
    if origins <= {int, types.NoneType}:
        values += ["1.5"]
    if types.NoneType not in origins:
        values += ["null"]
    return values


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def settings(world: World, tally: Tally) -> None:
    """Every setting with values of other types, and names that are nearly right."""
    path = world.place / "wrong.yaml"
    cases = [
        (f"{name}={value[:20]}", _yaml(name, value))
        for name, kind in fields(Config)
        for value in wrong_values(kind)
    ]
    cases += [(f"{name}x", _yaml(f"{name}x", "1")) for name, _ in fields(Config)]
    texts = {
        "an impossible date": "domain: {max_steps: 2020-13-45}",
        "a tag": "domain: {max_steps: !!python/name:os.system x}",
        "depth": "domain: " + "[" * 3000 + "]" * 3000,
        "a circle": "domain: &a {b: *a}",
        "an open quote": "model_type: 'x",
        "twice": "domain: {max_steps: 5, max_steps: 7}",
        "half a pair": 'prompt: {system: "\\uD800"}',
        "a list": "[1, 2]",
        "a text": "words",
        "tabs": "domain:\n\tmax_steps: 5",
        "a null byte": "model_type: a\0b",
        "no UTF-8": b"model_type: \xff\xfe",
    }
    cases += list(texts.items())
    for case, text in cases:
        content = text if isinstance(text, bytes) else f"{HEAD}{text}\n".encode()
        path.write_bytes(content)
        tally.refused("settings", case, _resolve(path))


def _yaml(name: str, value: str) -> str:
    *above, last = name.split(".")
    text = f"{last}: {value}"
    for section in reversed(above):
        text = f"{section}: {{{text}}}"
    return text


def _resolve(path: Path) -> Done:
    """What a script would say to a YAML, without a process of its own."""
    args = cli.parser("").parse_args(["--config", str(path)])
    try:
        cli.resolve_config(args)
    except Exception as error:
        told = failures.explain(error)
        if told is None:
            return Done(1, "", f"Traceback (most recent call last) {error!r}", 0.0)
        return Done(told[1], "", told[0], 0.0)
    return Done(0, "", "", 0.0)


# --- records --------------------------------------------------------------------------------------
WRONG: tuple[Any, ...] = (None, [], {}, "x", 5, -1.5, "missing")
WHOLE = {
    "empty": b"",
    "cut": b'{"stage": "domain", ',
    "a list": b"[]",
    "null": b"null",
    "deep": b"[" * 100_000,
    "no text": b"\xff\xfe\x00",
}


def mutations(record: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """(what was done, the record) with each field, down to a depth, dropped or of another type."""

    def places(value: Any, above: tuple, left: int) -> Iterator[tuple]:
        if left == 0 or not isinstance(value, dict):
            return
        for key in list(value)[:40]:
            yield (*above, key)
            yield from places(value[key], (*above, key), left - 1)

    for place in places(record, (), depth):
        for value in WRONG:
            made = copy.deepcopy(record)
            inside = made
            for key in place[:-1]:
                inside = inside[key]
            if type(inside[place[-1]]) is type(value) and value != "missing":
                continue
            if value == "missing":
                del inside[place[-1]]
            else:
                inside[place[-1]] = value
            yield f"{'.'.join(map(str, place))} = {value!r}", made


def records(world: World, tally: Tally) -> None:
    """stage.json, manifest.json and a result: each field wrong, and files that hold none at all."""
    stage, data, compared = (world.place / n for n in ("wrong_stage", "wrong_data", "wrong_result"))
    shutil.copytree(world.domain, stage)
    shutil.copytree(world.data, data)
    shutil.copytree(world.evaluation, compared)
    instruct = world.own("train_instruction.py", "--checkpoint", stage, "--data", world.data)
    domain = ["train_domain.py", "--config", world.config, "--data", data]
    compare = ["evaluate_model.py", "--compare", "final", "--output", compared, "--dry_run"]
    dry = ("--output", world.place / "never", "--dry_run")
    for name, file, command, needed in (
        ("stage.json", stage / "stage.json", [*instruct, *dry], STAGE_NEEDED),
        ("manifest.json", data / "manifest.json", world.own(*domain, *dry), {"files", "counts"}),
        ("result", compared / "final.json", compare, RESULT_NEEDED),
    ):
        whole = file.read_bytes()
        found = [*mutations(json.loads(whole), 1 if name == "result" else 2)]
        cases = [(case, json.dumps(made).encode()) for case, made in _sample(found, needed)]
        for case, content in [*cases, *WHOLE.items()]:
            file.write_bytes(content)
            # Of what nothing depends on, anything may be there.
            free = case not in WHOLE and case.split(" ")[0] not in needed
            free |= case == "base_identity = 'missing'"  # it stands among the inputs as well
            tally.refused(name, case, run(world.place, *command), (0, 2) if free else (2,))
        file.unlink()
        os.mkfifo(file)
        tally.refused(name, "a pipe", run(world.place, *command))
        file.unlink()
        file.mkdir()
        tally.refused(name, "a directory", run(world.place, *command))
        file.rmdir()
        file.write_bytes(whole)


# Without these a stage or a result cannot be used.
STAGE_NEEDED = {"stage", "base_model", "base_identity", "data_dir", "prompt", "config", "files"}
RESULT_NEEDED = {"n", "intervals", "verdicts", "answers", "cost", "contamination", "model", "areas"}
RESULT_NEEDED |= {"inputs", "knowledge", "too_long", "guide_areas"}


def _sample(found: list[tuple[str, Any]], needed: set[str]) -> list[tuple[str, Any]]:
    """All cases of the fields that are needed; of the others every ninth."""
    own = [case for case in found if case[0].split(" ")[0] in needed]
    others = [case for case in found if case[0].split(" ")[0] not in needed]
    return own + others[::9]


# --- paths ----------------------------------------------------------------------------------------
def places(world: World, tally: Tally) -> None:
    """Pipes, devices, directories, long names, files that may not be read, in place of an input."""
    place = world.place / "places"
    place.mkdir()
    os.mkfifo(place / "pipe")
    os.mkfifo(place / "pipe.jsonl")
    (place / "closed.jsonl").write_text('{"text": "x"}\n')
    (place / "closed.jsonl").chmod(0)
    (place / "dangling.jsonl").symlink_to(place / "nowhere")
    (place / "empty").mkdir()
    (place / "a_file").write_text("x")
    long = "n" * 300
    inputs = [place / "pipe", "/dev/zero", "/dev/full", place / "empty", place / long]
    inputs += [place / "a_file", place / "a_file/below", place / "nowhere", "", "\udcff"]
    never = place / "never"
    commands: dict[str, Callable[[Any], list]] = {
        "--config": lambda p: ["prepare_datasets.py", "--config", p, "--dry_run"],
        "--data": lambda p: [*world.train("domain", never)[:3], "--data", p, "--dry_run"],
        "--checkpoint": lambda p: ["train_instruction.py", "--checkpoint", p, "--dry_run"],
        "--input": lambda p: ["compress_model.py", "--input", p, "--dry_run"],
        "--bundle": lambda p: ["evaluate_model.py", "--bundle", p, "--dry_run"],
        "--compare": lambda p: ["evaluate_model.py", "--compare", p, "--output", never],
        "--sets": lambda p: [*world.evaluate(never), "--dry_run", "--sets", f"own={p}:questions"],
        "model.path": lambda p: [
            *world.train("domain", never),
            "--dry_run",
            "--set",
            f"model.path={p}",
        ],
    }
    for flag, command in commands.items():
        for path in inputs:
            case = f"{flag} {ascii(str(path))[:40]}"
            if flag == "model.path" and str(path) == "":
                continue  # the model's name counts then
            done = run(place, *command(_argument(path)))
            tally.refused("inputs", case, done)
    sources = [place / n for n in ("pipe.jsonl", "dangling.jsonl", "empty", f"{long}.jsonl")]
    sources += [Path("/dev/zero"), place / "nowhere.jsonl"]
    for source in sources:
        command = world.prepare(never, place / "cache")
        done = run(place, *command, "--set", f"data.domain.0.path={source}")
        tally.refused("inputs", f"data {source.name[:40]}", done)
    if os.getuid() == 0:
        place.chmod(0o777)
        command = world.prepare(place / "closed", place / "cache2")
        setting = ("--set", f"data.domain.0.path={place / 'closed.jsonl'}")
        tally.refused(
            "inputs", "data that may not be read", run(place, *command, *setting, before=nobody)
        )
    outputs = [place / "a_file", place / "a_file/below", place / long, place / "pipe", "/dev/null"]
    outputs += [place / ("n" * 250), ".", "/", ".."]
    (place / "link").symlink_to(place / "empty")
    outputs.append(place / "link")
    for output in outputs:
        for script, command in (
            ("prepare", world.prepare(Path(output), place / "cache")),
            ("domain", world.train("domain", Path(output))),
        ):
            done = run(place, *command, "--overwrite")
            tally.refused("outputs", f"{script} --output {str(output)[-40:]}", done)
    for output in (place / "pipe", "/dev/null", place / "empty", place / long):
        command = ["evaluate_model.py", "--compare", "final", "--output", world.evaluation]
        for flag in ("--markdown", "--json"):
            done = run(place, *command, flag, output)
            tally.refused("outputs", f"compare {flag} {str(output)[-40:]}", done)


def _argument(path: Any) -> str:
    return os.fsencode(str(path)).decode("utf-8", "surrogateescape")


# --- contents -------------------------------------------------------------------------------------
def contents(world: World, tally: Tally) -> None:
    """What was changed since it was made: data, caches, base model, adapter."""
    place = world.place / "contents"
    place.mkdir()
    edited_data(world, tally, place)
    edited_caches(world, tally, place)
    for how in ("config", "weights", "tokenizer", "cut", "pipe", "index", "code", "pickle"):
        damaged_base(world, tally, place, how)
    for how in ("half", "renamed", "nan", "alpha", "rank", "cut", "pickle", "empty", "no config"):
        damaged_adapter(world, tally, place, how)


def edited_data(world: World, tally: Tally, place: Path) -> None:
    data = place / "data"
    shutil.copytree(world.data, data)
    command = ["train_domain.py", "--config", world.config, "--data", data, "--dry_run"]
    command = world.own(*command, "--output", place / "never")  # its tokens are in the cache
    file = data / "domain/train.jsonl"
    whole = file.read_bytes()
    for case, content in (
        ("edited", whole.replace(b"heart", b"HEART")),
        ("cut", whole[:-20]),
        ("empty", b""),
        ("deleted", None),
    ):
        file.unlink() if content is None else file.write_bytes(content)
        tally.refused("contents", f"prepared rows {case}", run(place, *command))
    file.write_bytes(whole)


def edited_caches(world: World, tally: Tally, place: Path) -> None:
    """A byte of each file of a cache: the result is as if the cache had not been there."""
    cache = place / "cache"
    done = run(place, *world.prepare(place / "first", cache))
    wanted = _digests(place / "first")
    for file in sorted((cache / "sources").rglob("*")):
        if not file.is_file() or not file.stat().st_size or file.name.startswith("."):
            continue
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(whole)
        output = place / "again"
        done = run(place, *world.prepare(output, cache))
        same = done.code == 0 and _digests(output) == wanted
        kind = "identical" if same else ("traceback" if done.traceback else "silent")
        tally.add("contents", f"cache, {file.name}", kind, done.last)
        shutil.rmtree(output, ignore_errors=True)
    tokens = place / "tokens"
    command = [*world.train("domain", place / "t1"), "--dry_run"]
    command[command.index(f"data.cache_dir={world.cache}")] = f"data.cache_dir={tokens}"
    before = run(place, *command).out
    for file in sorted(tokens.rglob("*.npy")):
        whole = bytearray(file.read_bytes())
        whole[-1 if file.name != "ids.npy" else -4] ^= 1
        file.write_bytes(whole)
        done = run(place, *command)
        same = done.code == 0 and done.out == before and file.read_bytes() != bytes(whole)
        kind = "identical" if same else ("traceback" if done.traceback else "silent")
        tally.add("contents", f"cached tokens, {file.name}", kind, done.last)


def _digests(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def damaged_base(world: World, tally: Tally, place: Path, how: str) -> None:
    """A base model that changed between two stages, or that cannot be one."""
    base = place / f"base-{how}"
    shutil.copytree(world.model, base)
    config, weights = base / "config.json", base / "model.safetensors"
    values = json.loads(config.read_text())
    if how == "config":
        config.write_text(json.dumps(values | {"layer_norm_eps": 0.5}))
    elif how == "weights":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif how == "tokenizer":
        (base / "tokenizer.json").write_text("{")
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "pipe":
        weights.unlink()
        os.mkfifo(weights)
    elif how == "index":
        index = {"weight_map": {"a": "../elsewhere.safetensors"}}
        (base / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "code":
        config.write_text(
            json.dumps(values | {"model_type": "own", "auto_map": {"AutoConfig": "x.Y"}})
        )
    else:
        weights.rename(base / "pytorch_model.bin")
    command = world.train("instruction", place / "never")
    if how == "tokenizer":  # later stages read their parent's
        command = world.train("domain", place / "never")
    done = run(place, *command, "--dry_run", "--set", f"model.path={base}")
    tally.refused("contents", f"base model, {how}", done)


def damaged_adapter(world: World, tally: Tally, place: Path, how: str) -> None:
    """An adapter that is not what was trained, with its sha256 put right in stage.json."""
    import torch
    from safetensors.torch import load_file, save_file

    got = place / f"adapter-{how.replace(' ', '_')}"
    shutil.copytree(world.domain, got)
    weights, config = got / "adapter_model.safetensors", got / "adapter_config.json"
    tensors, values = load_file(weights), json.loads(config.read_text())
    if how == "half":
        save_file(dict([*tensors.items()][::2]), weights, metadata={"format": "pt"})
    elif how == "renamed":
        save_file({f"x{k}": v for k, v in tensors.items()}, weights, metadata={"format": "pt"})
    elif how == "nan":
        nan = {k: v * float("nan") for k, v in tensors.items()}
        save_file(nan, weights, metadata={"format": "pt"})
    elif how in ("alpha", "rank"):
        name = {"alpha": "lora_alpha", "rank": "r"}[how]
        config.write_text(json.dumps(values | {name: values[name] * 1000}))
    elif how == "cut":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif how == "empty":
        weights.write_bytes(b"")
    elif how == "pickle":
        weights.unlink()
        torch.save(tensors, got / "adapter_model.bin")
    else:
        config.write_text("[]")
    record = json.loads((got / "stage.json").read_text())
    names = [
        "adapter_model.bin" if how == "pickle" and "model" in n else n for n in record["files"]
    ]
    record["files"] = {n: hashlib.sha256((got / n).read_bytes()).hexdigest() for n in names}
    (got / "stage.json").write_text(json.dumps(record))
    command = world.own("train_instruction.py", "--checkpoint", got, "--data", world.data)
    done = run(place, *command, "--output", place / "never", "--dry_run")
    # Numbers that are not finite are failed work.
    tally.refused("contents", f"adapter, {how}", done, (1,) if how == "nan" else (2,))
