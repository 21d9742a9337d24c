"""One way to write: a file or directory under a name that somebody reads is whole or not there."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
from conftest import ROOT

from liteguard import writing
from liteguard.errors import UserError

# Calls that write, rename or delete.
CALLS = {"rename", "renames", "unlink", "rmtree", "write_text", "write_bytes", "truncate", "link"}
CALLS |= {"symlink", "symlink_to", "hardlink_to", "copyfile", "copytree", "copy2", "move", "rmdir"}
CALLS |= {"save", "savez", "savefig", "save_file", "tofile", "touch"}
WHOLE = "into what writing.replacing gives"
WORK = "in a work directory, which gets its name as a whole"
OWN = "in a temporary folder of this process"
# file: call -> (how many there are, why they need no `writing`)
ALLOWED = {
    "writing": {
        **{"rmtree": (1, "it is the one"), "unlink": (1, "it is the one")},
        **{"replace": (4, "it is the one"), "open": (1, "it is the one")},
        **{"write_bytes": (1, "it is the one"), "write_text": (2, "it is the one")},
        "rmdir": (1, "it is the one"),
    },
    "checkpoints": {"replace": (1, WORK), "rmdir": (1, WORK)},
    "machine": {
        "fdopen": (1, "a lock: its content is a note"),
        "truncate": (1, "a lock: its content is a note"),
        "unlink": (1, "a lock that this process holds"),
    },
    "distributed": {"open": (1, "/dev/null")},
    "demo": {"open": (1, "a log")},
    "data/overlap": {"open": (1, WHOLE), "savez": (1, WHOLE)},
    "data/exams": {"save": (1, WHOLE)},
    "data/lengths": {"savefig": (1, WHOLE)},
    "data/preparation": {"open": (1, WORK)},
    "data/splits": {"open": (1, WORK)},
    "data/shards": {"open": (3, WORK)},
    "embedded/smollm2": {"write_bytes": (1, WORK), "unlink": (1, WORK)},
    "evaluation/journal": {
        "open": (1, "appended line by line; a cut line is dropped"),
        "truncate": (1, "what is cut off is no result"),
        "unlink": (2, "its content is in a finished result"),
    },
    "evaluation/plots": {"savefig": (1, "into memory")},
    "export/bundle": {"open": (1, WHOLE), "write_bytes": (1, OWN)},
    "export/calibration": {"save": (1, "it replaces")},
    "export/chosen": {"save_file": (1, WHOLE)},
    "export/outputs": {"unlink": (2, WORK)},
    "export/tflite": {
        **{"link": (1, WHOLE), "rmtree": (2, WORK), "unlink": (1, "a log")},
        "open": (1, "a log"),
    },
    "export/shapes": {"symlink_to": (1, OWN)},
    "export/possible": {"write_text": (2, OWN)},
    "export/sentencepiece_native": {"write_text": (1, OWN)},
    "export/smoothing": {"copy2": (1, WHOLE)},
    "export/task_format": {"open": (1, WHOLE)},
    "planning_probe": {"write_text": (2, OWN)},
    "runtime/container": {"rmtree": (2, OWN)},
    "runtime/scorer": {"open": (1, OWN)},
    "training/callbacks": {"save_file": (1, WHOLE)},
    "training/reference": {"save_file": (1, WHOLE)},
    "training/stage": {
        "rmtree": (1, "a trainer's checkpoint that a kill left incomplete"),
        "unlink": (1, WORK),
        "savefig": (1, WORK),
    },
    "training/tokens": {"save": (1, WHOLE)},
    "wheels": {"unlink": (1, "a package that is not the pinned one, in its cache")},
}


def writes(file: Path) -> dict[str, int]:
    """Calls in a file that write, rename or delete -> how many."""
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = getattr(function, "attr", getattr(function, "id", ""))
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner = function.value.id
        else:
            owner = ""
        modes = [v.value for v in ast.walk(node) if isinstance(v, ast.Constant)]
        modes = [m for m in modes if isinstance(m, str) and {*m} <= {*"rwaxbt+"} and len(m) <= 3]
        counts = (
            (name in CALLS and owner not in ("writing", "checkpoints"))
            or (name == "replace" and owner == "os")  # a text has one, too
            or (name in ("open", "fdopen") and any({*mode} & {*"wax+"} for mode in modes))
        )
        if counts:
            found[name] = found.get(name, 0) + 1
    return found


def test_nobody_else_writes():
    """A new write goes through `writing`, or is listed here with the reason why it need not."""
    files = [*(ROOT / "liteguard").rglob("*.py"), *ROOT.glob("*.py")]
    found = {str(f.relative_to(ROOT).with_suffix("")).removeprefix("liteguard/"): f for f in files}
    wrong = {}
    for name, file in found.items():
        allowed = {call: count for call, (count, _) in ALLOWED.get(name, {}).items()}
        counts = writes(file)
        more = {call: n for call, n in counts.items() if n > allowed.get(call, 0)}
        fewer = {call: n for call, n in allowed.items() if n > counts.get(call, 0)}
        if more or fewer:
            wrong[name] = {"not allowed": more, "allowed, and not there": fewer}
    assert not wrong


def test_a_fingerprint_tells_an_edited_file(tmp_path, monkeypatch):
    small, large = tmp_path / "small", tmp_path / "large"
    monkeypatch.setattr(writing, "_WHOLE", 1 << 20)
    small.write_bytes(b"a" * 1000)
    large.write_bytes(bytes(range(256)) * (1 << 15))
    before = writing.fingerprints(tmp_path)
    assert writing.is_whole(tmp_path, before)
    times = small.stat().st_atime_ns, small.stat().st_mtime_ns
    small.write_bytes(b"a" * 999 + b"b")
    os.utime(small, ns=times)
    assert writing.fingerprint(small) != before["small"], "by its content alone"
    with large.open("r+b") as file:  # between two blocks that are looked at
        file.seek(3_000_000)
        file.write(b"edited")
    assert writing.fingerprint(large) != before["large"]
    assert not writing.is_whole(tmp_path, before)
    for expected in (None, {}, [], {"small": 5}, {"gone": before["small"]}, "x"):
        assert not writing.is_whole(tmp_path, expected)


def test_a_file_of_a_dead_process_does_not_stay_in_a_cache(tmp_path):
    old, new = tmp_path / ".x.1.partial", tmp_path / ".x.2.partial"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    writing.write_json(tmp_path / "x", {}, shared=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.2.partial", "x"]


def test_what_is_no_file_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="a file is needed there"):
            writing.require_file(path)
    writing.require_file(tmp_path / "nothing")


def test_planted_links_are_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".x.partial").symlink_to(victim)
    writing.write_text(tmp_path / "x", "new")
    assert victim.read_text() == "mine" and (tmp_path / "x").read_text() == "new"
    (tmp_path / "folder").symlink_to(tmp_path)
    writing.remove(tmp_path / "folder")
    assert victim.exists()
