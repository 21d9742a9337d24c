"""What a cache keeps is made again where it is not as it was written: no traceback, same result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from liteguard import registry, writing
from liteguard.config import build
from liteguard.config.config import Config
from liteguard.data import entities, exams
from liteguard.data.overlap import OverlapIndex
from liteguard.export import possible


def config_of(tmp_path: Path, **data: object) -> Config:
    return build([("test", {"data": {"cache_dir": str(tmp_path / "cache"), **data}})])


def damage(content: bytes) -> list[bytes]:
    """One byte changed, the end cut off, nothing, another value of the same form."""
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    return [
        bytes(flipped),
        content[: len(content) // 2],
        b"",
        content.replace(b"asthma", b"cough!"),
    ]


def check(directory: Path, read: Callable[[], object]) -> None:
    """`read` gives the same whatever happens to a file below `directory`."""
    wanted = read()
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert any(path.suffix == ".sum" for path in files)
    assert read() == wanted and {p: p.read_bytes() for p in files} == files, "it is kept"
    for path, content in files.items():
        for damaged in damage(content):
            path.write_bytes(damaged)
            assert read() == wanted, f"{path.name}: {damaged[:20]!r}"
            assert writing.is_sealed(path.with_name(path.name.removesuffix(".sum")))
        path.unlink()
        assert read() == wanted, path.name


def test_the_index_of_evaluation_sets(tmp_path):
    exam = tmp_path / "exam.jsonl"
    asked = [f"What helps against asthma of the kind {n} in the cold of winter?" for n in range(3)]
    exam.write_text("".join(json.dumps({"question": text}) + "\n" for text in asked))
    config = config_of(tmp_path, decontaminate=[str(exam)])

    def read() -> object:
        path = exams.evaluation_index(config, exams.evaluation_inputs(config))
        arrays = OverlapIndex.load(path).arrays
        return exams.evaluation_report(path), {k: v.tolist() for k, v in arrays.items()}

    check(tmp_path / "cache", read)


def test_the_names_of_diseases(tmp_path, monkeypatch):
    names = {"asthma": "asthma", "bronchial asthma": "asthma"}
    monkeypatch.setattr(registry, "ENTITIES", (("wheel",), lambda cache: names))

    def read() -> object:
        path = entities.names_file(tmp_path / "cache", {"wheel": "0"}, {})
        return json.loads(path.read_text())

    check(tmp_path / "cache", read)


def test_what_can_be_made_of_a_base_model(tmp_path, monkeypatch):
    for name, value in {"sample": ([], []), "as_litertlm": "no asthma"}.items():
        monkeypatch.setattr(possible, name, lambda *given, value=value: value)
    for name in ("wrong", "not_known"):
        monkeypatch.setattr(possible.shapes, name, lambda *given: "")
    monkeypatch.setattr(possible, "as_task", lambda *given: ("", "0 texts"))
    text = SimpleNamespace(vocab_size=8)
    architecture = SimpleNamespace(get_text_config=lambda: text)
    own = SimpleNamespace(backend_tokenizer=SimpleNamespace(to_str=lambda: "{}"))
    config = config_of(tmp_path)

    def read() -> object:
        return possible.possible(config, architecture, own, tmp_path, tmp_path)

    check(tmp_path / "cache", read)


@pytest.mark.parametrize("left", [None, "", "0:00"])
def test_what_has_no_seal_is_not_trusted(tmp_path, left):
    """A kill between the two, or an earlier version."""
    (tmp_path / "x").write_text("content")
    if left is not None:
        (tmp_path / "x.sum").write_text(left)
    assert not writing.is_sealed(tmp_path / "x")
    writing.seal(tmp_path / "x")
    assert writing.is_sealed(tmp_path / "x") and not writing.is_sealed(tmp_path / "y")
