"""Hub and local data: every kind of file and format, broken rows and files, hostile archives."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
import tempfile
import time
import tracemalloc
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
from conftest import ROOT, fail, prepare, succeed

from liteguard import wheels
from liteguard.checkpoints import sha256_file
from liteguard.config import SourceSection, build, read_yaml
from liteguard.data import conversations, datasets, formats, preparation, readers
from liteguard.data.cleaning import Rules
from liteguard.data.readers import Broken
from liteguard.data.shards import Cleaner, clean_source
from liteguard.data.splits import Part, trained_entities, write_part
from liteguard.errors import UserError, WorkError
from liteguard.rows import FIELDS, SPLITS, load_split
from liteguard.text import normalise
from liteguard.wheels import WHEELS, fetch_wheel, read_member

FIXTURES = Path(__file__).parent / "fixtures"


def read(path: Path, dataset: str = "plain_text", **options) -> list:
    """What a dataset function yields for a local file or directory."""
    source = SourceSection(dataset=dataset, path=str(path), **options)
    return list(datasets.DATASETS[dataset][1](source, Path("unused")))


def texts(path: Path, **options) -> list[str]:
    return [row["text"] for row in read(path, **options)]


def write(path: Path, content: str | bytes) -> Path:
    """A file with `content`, packed when its name ends in .gz."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def jsonl(path: Path, rows: list) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def sound(count: int) -> list[dict]:
    return [{"text": f"A sound sentence about topic number {n}."} for n in range(count)]


def collect(part: str, *entries: dict, **data) -> tuple[dict, list[dict]]:
    """Rows by split and manifest entries of one part, for sources given as in the YAML."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        settings = {"validation_share": 0.2, "test_share": 0.2, "cache_dir": name, **data}
        values = {"model_type": "test", "data": {**settings, part: list(entries)}}
        config = build([("test", values)]).data
        with Cleaner() as cleaner:
            shards = [
                clean_source(Rules(part, source, config), cleaner, lambda line: None)
                for source in getattr(config, part)
            ]
        joined = Part.join(part, shards)
        with (work / "dropped.jsonl").open("wb") as dropped:
            write_part(joined, work, dropped, trained_entities(joined))
        splits = {
            split: [json.loads(line) for line in (work / part / f"{split}.jsonl").open()]
            for split in SPLITS
        }
        return splits, preparation.source_entries(joined)


# --- kinds of files -------------------------------------------------------------------------------

CONTENTS = {
    ".jsonl": '{"text": "One."}\n\n{"text": "Two, \\"quoted\\"."}\r\n',
    ".json": '[{"text": "One."}, {"text": "Two, \\"quoted\\"."}]',
    ".csv": 'id,text\n1,One.\n\n2,"Two, ""quoted""."\n',
    ".tsv": 'id\ttext\n1\tOne.\n2\t"Two, ""quoted""."\n',
    ".txt": 'One.\n \n\nTwo,\n"quoted".',
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", CONTENTS)
def test_every_kind_of_text_file_packed_or_not(tmp_path, kind, packed):
    path = write(tmp_path / f"data{kind}{packed}", CONTENTS[kind])
    assert [normalise(text) for text in texts(path)] == ["One.", 'Two, "quoted".']


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path, kind):
    path = write(tmp_path / f"data{kind}", b"\xef\xbb\xbf" + CONTENTS[kind].encode())
    assert texts(path)[0] == "One." and len(texts(path)) == 2


def test_parquet_and_an_object_with_one_list(tmp_path):
    table = pyarrow.Table.from_pylist(sound(2500))
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{**row, "entity": None} for row in sound(2500)]
    path = write(tmp_path / "b.json", json.dumps({"version": 1, "data": sound(3)}))
    assert len(read(path)) == 3
    path = write(tmp_path / "c.json", json.dumps({"train": sound(3), "test": sound(1)}))
    with pytest.raises(UserError, match="object with one such list"):
        read(path)


def test_a_text_file_has_a_text_per_paragraph_or_per_line(tmp_path):
    path = write(tmp_path / "book.txt", "One\nand two.\n\nThree.\n")
    assert texts(path) == ["One\nand two.", "Three."]
    assert texts(path, text_unit="line") == ["One", "and two.", "Three."]
    # A book with a paragraph a line would be one text, and be dropped as too long.
    path = write(tmp_path / "lines.txt", "A line that is a text of its own.\n" * 101)
    with pytest.raises(UserError, match="text_unit: line"):
        read(path)
    assert len(read(path, text_unit="line")) == 101


def test_a_directory_is_read_in_order_and_says_what_it_leaves_out(tmp_path, capsys):
    for name in ("b/2.txt", "b/1.jsonl", "a.csv.gz"):
        content = {"2.txt": name, "1.jsonl": json.dumps({"text": name})}
        write(tmp_path / name, content.get(Path(name).name, f"text\n{name}\n"))
    for name in (".gitattributes", ".cache/x.jsonl", "README.md", "b/LICENSE", "b/license-mit.txt"):
        write(tmp_path / name, '{"text": "must not be read"}\n')
    # A name like these is data when it ends like data.
    write(tmp_path / "c/notice.jsonl", '{"text": "c/notice.jsonl"}\n')
    assert texts(tmp_path) == ["a.csv.gz", "b/1.jsonl", "b/2.txt", "c/notice.jsonl"]
    shown = capsys.readouterr().out
    for name in (".gitattributes", ".cache/x.jsonl", "README.md", "b/LICENSE", "b/license-mit.txt"):
        assert name in shown
    assert "notice.jsonl" not in shown
    write(tmp_path / "b/3.docx", "x")
    with pytest.raises(UserError, match=r"3\.docx: unknown kind of data file\. Allowed: \.jsonl,"):
        read(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read(tmp_path / "none")


def test_large_files_are_streamed(tmp_path):
    rows = [{"text": f"{n} " + "x" * 1000} for n in range(30_000)]
    path = jsonl(tmp_path / "large.jsonl.gz", rows)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows), tmp_path / "large.parquet", row_group_size=2000
    )
    del rows
    for file in (path, tmp_path / "large.parquet"):
        source = SourceSection(dataset="plain_text", path=str(file))
        before = pyarrow.total_allocated_bytes()
        tracemalloc.start()
        assert sum(1 for _ in formats.formatted(source, tmp_path)) == 30_000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # 30 MB of text; a batch of 1,000 rows has 1 MB.
        assert peak < 8e6 and pyarrow.total_allocated_bytes() - before < 8e6, file


# --- broken rows ----------------------------------------------------------------------------------


def test_each_kind_of_bad_line_is_one_broken_row(tmp_path):
    lines = [
        b'{"text": "Good."}',
        b'{"text": "cut of',
        b'["a", "list"]',
        b'{"text": "caf\xe9"}',
        b'{"text": "' + b"x" * 10_000_001 + b'"}',
        b'{"text": null}',
        b'{"text": 7}',
        b'{"other": "column"}',
        b'{"text": "half a pair: \\ud800"}',
        b"[" * 200_000,
        b'{"text": "Good too."}',
    ]
    path = write(tmp_path / "x.jsonl", b"\n".join(lines))
    found = read(path)
    assert [found[0]["text"], found[-1]["text"]] == ["Good.", "Good too."]
    assert [(row.place, row.reason) for row in found[1:-1]] == [
        (f"{path}, line 2", "not JSON"),
        (f"{path}, line 3", "not an object with columns"),
        (f"{path}, line 4", "not UTF-8"),
        (f"{path}, line 5", "line longer than 10 MB"),
        (f"{path}, line 6", "missing or not text"),
        (f"{path}, line 7", "missing or not text"),
        (f"{path}, line 8", "missing or not text"),
        (f"{path}, line 9", "not UTF-8"),
        (f"{path}, line 10", "not JSON"),
    ]
    for row in found[1:-1]:
        assert isinstance(row, Broken) and 0 < len(row.text) <= 200 and row.text.isprintable()
    assert found[5].text.startswith("text is None")


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_a_line_longer_than_10_mb_is_never_held_as_a_whole(tmp_path, kind):
    parts = {
        ".jsonl": (b'{"text": "One."}\n{"text": "', b'"}\n{"text": "Two."}\n'),
        ".csv": (b'text\nOne.\n"', b'"\nTwo.\n'),
        ".txt": (b"One.\n\n", b"\n\nTwo.\n"),
    }
    head, tail = parts[kind]
    path = write(tmp_path / f"x{kind}", head + b"y" * 60_000_000 + tail)
    tracemalloc.start()
    found = read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [found[0]["text"], found[2]["text"], len(found)] == ["One.", "Two.", 3]
    assert isinstance(found[1], Broken) and "longer than 10 MB" in found[1].reason
    assert peak < 45e6


def test_a_line_of_exactly_10_mb_is_read(tmp_path):
    length = 10_000_000 - len('{"text": ""}')
    path = write(tmp_path / "x.jsonl", json.dumps({"text": "z" * length}))
    assert [len(text) for text in texts(path)] == [length]


def test_bad_csv_rows_count_with_every_line_they_take(tmp_path):
    path = write(
        tmp_path / "x.csv", b'id,text\n1,"A\nB"\n2,caf\xe9\n3,x,y\n4\n5,"no end\n6,x\n7,x\n'
    )
    found = read(path)
    assert found[0]["text"] == "A\nB"
    assert [(row.place.rsplit(" ", 1)[1], row.reason) for row in found[1:]] == [
        ("4", "not UTF-8"),
        ("5", "more cells than the header"),
        ("6", "missing or not text"),
        ("7", "not a CSV row"),
        ("8", "not a CSV row"),
        ("9", "not a CSV row"),
    ]
    path = write(tmp_path / "first.csv", "id,text\n1\n2,x\n")
    first, second = read(path)  # cells are missing, but not the column
    assert first.reason == "missing or not text" and second["text"] == "x"
    path = write(tmp_path / "y.csv", "text,text\na,b\n")
    with pytest.raises(UserError, match="two columns have the same name"):
        read(path)


def test_invalid_utf8_in_parquet_and_txt_costs_its_row_only(tmp_path):
    values = pyarrow.array([b"One.", b"caf\xe9", b"Two."])
    column = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "x.parquet")
    write(tmp_path / "x.txt", b"One.\n\ncaf\xe9\n\nTwo.\n")
    for name, place in (("x.parquet", "row 2"), ("x.txt", "line 3")):
        one, two, three = read(tmp_path / name)
        assert (one["text"], three["text"]) == ("One.", "Two.")
        assert two.reason == "not UTF-8" and two.place.endswith(f"{name}, {place}")


def test_nul_bytes_are_dropped_from_texts(tmp_path):
    rows = [{"text": f"Sentence {n} of a text with\x00 a zero byte in it."} for n in range(40)]
    write(tmp_path / "b.txt", "\n\n".join(f"Another sentence, num\x00ber {n}." for n in range(40)))
    jsonl(tmp_path / "a.jsonl", rows)
    splits, entries = collect("domain", {"dataset": "plain_text", "path": str(tmp_path)})
    found = [row["text"] for rows in splits.values() for row in rows]
    assert len(found) == 80 and not any("\x00" in text for text in found)
    assert "Another sentence, number 7." in found and entries[0]["dropped"] == {}


def test_a_null_in_a_preference_row_is_counted_and_only_that_row_is_lost(tmp_path):
    rows = [
        {
            "prompt": f"Question {n}?",
            "chosen": f"A sound and long answer, {n}.",
            "rejected": f"No answer, nothing, {n}.",
        }
        for n in range(150)
    ]
    rows[42]["rejected"] = None
    path = jsonl(tmp_path / "x.jsonl", rows)
    splits, entries = collect("preference", {"dataset": "preference", "path": str(path)})
    assert entries[0]["dropped"] == {"missing or not text": 1}
    assert sum(map(len, splits.values())) == 149 == entries[0]["rows_kept"]
    assert not any(row["prompt"] == "Question 42?" for rows in splits.values() for row in rows)


def test_more_than_one_percent_of_broken_rows_is_an_error_that_names_them(tmp_path):
    lines = [json.dumps(row) for row in sound(200)]
    entry = {"dataset": "plain_text", "path": str(write(tmp_path / "x.jsonl", "\n".join(lines)))}
    lines[9] = lines[99] = "not JSON"
    write(tmp_path / "x.jsonl", "\n".join(lines))
    _, entries = collect("domain", entry)
    assert entries[0]["dropped"] == {"not JSON": 2} and entries[0]["rows_read"] == 200
    lines[149] = '{"text": "caf\xe9"}'
    write(tmp_path / "x.jsonl", "\n".join(lines).encode("latin-1"))
    with pytest.raises(UserError) as error:
        collect("domain", entry)
    message = str(error.value)
    assert "3 of 200 rows are broken (1.5%, allowed: 1.0%)" in message
    for expected in (
        "line 10: not JSON: not JSON",
        "line 100:",
        "line 150: not UTF-8",
        "encoding: cp1252",
    ):
        assert expected in message
    assert "max_broken:" in message and entry["path"] in message
    _, entries = collect("domain", {**entry, "max_broken": 0.02})
    assert entries[0]["dropped"] == {"not JSON": 2, "not UTF-8": 1}


def test_the_share_is_that_of_the_source_when_a_limit_samples_it(tmp_path):
    lines = [json.dumps(row) for row in sound(1000)]
    lines[5:10] = ["not JSON"] * 5
    path = write(tmp_path / "x.jsonl", "\n".join(lines))
    entry = {"dataset": "plain_text", "path": str(path), "limit": 100}
    splits, entries = collect("domain", entry)  # 5 of 1,000, though of 100 kept
    assert sum(map(len, splits.values())) == 100 and entries[0]["dropped"] == {"not JSON": 5}
    write(path, "\n".join([*lines, *["not JSON"] * 20]))
    with pytest.raises(UserError, match="25 of 1,020 rows are broken"):
        collect("domain", entry)


# --- broken files ---------------------------------------------------------------------------------


def test_truncated_and_damaged_files_are_errors_that_say_what_to_do(tmp_path):
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in sound(5000)).encode())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(sound(5000)), tmp_path / "whole.parquet")
    columns = (tmp_path / "whole.parquet").read_bytes()
    files = {
        "cut.jsonl.gz": (packed[: len(packed) // 2], "gzip file is truncated or damaged"),
        "flipped.jsonl.gz": (
            packed[:2000] + bytes([packed[2000] ^ 255]) + packed[2001:],
            "gzip file is truncated or damaged",
        ),
        "plain.csv.gz": (b"text\nnot packed\n", "gzip file is truncated or damaged"),
        "cut.parquet": (columns[: len(columns) // 2], "cannot be read"),
        "empty.parquet": (b"", "cannot be read"),
        "holed.parquet": (columns[:8] + bytes(400) + columns[408:], "cannot be read"),
        "cut.json": (b'[{"text": "x"}, {"te', "not a JSON file"),
        "latin.json": (b'[{"text": "caf\xe9"}]', "not a JSON file"),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            read(tmp_path / name)
        assert expected in str(error.value) and name in str(error.value), name
        assert any(word in str(error.value) for word in ("again", "name it .jsonl")), name


def test_a_large_json_file_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    path = write(tmp_path / "x.json.gz", json.dumps(sound(100)))
    monkeypatch.setattr(readers, "MAX_WHOLE_BYTES", 1000)
    with pytest.raises(UserError, match=r"\.jsonl file, which is streamed"):
        read(path)


def test_the_script_ends_with_exit_code_2_and_one_message(tiny_config, tmp_path):
    packed = gzip.compress(b'{"body": "A text."}\n' * 3000)
    (tmp_path / "texts.jsonl.gz").write_bytes(packed[:-12])
    path = tmp_path / "texts.jsonl.gz"
    message = fail(2, *prepare(tiny_config, tmp_path / "out", path), cwd=tmp_path)
    assert "texts.jsonl.gz: cannot be read" in message and "gzip -t" in message
    assert not (tmp_path / "out").exists()


# --- formats --------------------------------------------------------------------------------------

USER = {"role": "user", "content": "What is flu?"}
REPLY = {"role": "assistant", "content": "An infection."}
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
MORE = [
    {"role": "user", "content": "And a cold?"},
    {"role": "assistant", "content": "A milder one."},
]
ASKED = {"prompt": "What is flu?", "completion": "An infection."}
TALK = {
    "prompt": "And a cold?",
    "completion": "A milder one.",
    "history": [["What is flu?", "An infection."]],
    "system": SYSTEM["content"],
}


def shared(*turns: dict) -> list[dict]:
    """Messages in the ShareGPT spelling."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]


@pytest.mark.parametrize(
    ("dataset", "row", "expected"),
    [
        ("messages", {"messages": [USER, REPLY]}, ASKED),
        ("messages", {"messages": [SYSTEM, USER, REPLY, *MORE]}, TALK),
        ("sharegpt", {"conversations": shared(SYSTEM, USER, REPLY, *MORE)}, TALK),
        ("prompt_completion", ASKED, ASKED),
        (
            "prompt_completion",
            {"prompt": [SYSTEM, USER], "completion": [REPLY]},
            {**ASKED, "system": SYSTEM["content"]},
        ),
        (
            "alpaca",
            {"instruction": "What is flu?", "input": None, "output": "An infection."},
            ASKED,
        ),
        ("alpaca", {"instruction": "What is flu?", "output": "An infection."}, ASKED),
        (
            "alpaca",
            {
                "instruction": "You are a doctor.",
                "input": "What is flu?",
                "output": "An infection.",
            },
            ASKED,
        ),
    ],
)
def test_instruction_formats(tmp_path, dataset, row, expected):
    (found,) = read(jsonl(tmp_path / "x.jsonl", [row]), dataset)
    assert found == {**expected, "kind": "question", "entity": None}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is flu?", "chosen": "An infection.", "rejected": "No idea."},
        {"prompt": [SYSTEM, USER], "chosen": [REPLY], "rejected": "No idea."},
        {
            "prompt": "What is flu?",
            "chosen": [USER, REPLY],
            "rejected": [USER, {"role": "assistant", "content": "No idea."}],
        },
        {
            "prompt": "What is flu?",
            "chosen": "What is flu? An infection.",
            "rejected": "What is flu? No idea.",
        },
    ],
)
def test_preference_formats(tmp_path, row):
    (found,) = read(jsonl(tmp_path / "x.jsonl", [row]), "preference")
    found = {name: found[name].strip() for name in ("prompt", "chosen", "rejected")}
    assert found == {"prompt": "What is flu?", "chosen": "An infection.", "rejected": "No idea."}


def test_what_a_format_does_with_turns_is_counted(tmp_path):
    rows = [
        {"messages": [USER, REPLY]},
        {"messages": [SYSTEM, USER, REPLY]},
        {"messages": [SYSTEM, USER, REPLY, *MORE]},
    ]
    path = jsonl(tmp_path / "x.jsonl", rows)
    found = formats.formatted(SourceSection(dataset="messages", path=str(path)), tmp_path)
    assert len(list(found)) == 3
    assert found.notes == {
        conversations.SYSTEM: 2,
        formats.CONVERSATIONS: 1,
    }


@pytest.mark.parametrize(
    ("dataset", "row", "reason"),
    [
        ("messages", {"messages": [USER]}, "no user turn with an assistant's answer"),
        ("messages", {"messages": "What is flu?"}, "not a list of messages"),
        ("messages", {"messages": [USER, {"role": "assistant"}]}, "missing or not text"),
        (
            "preference",
            {"prompt": "What is flu?", "chosen": [REPLY, USER], "rejected": "No."},
            "the last message is not the assistant's",
        ),
        (
            "preference",
            {"prompt": [], "chosen": "Yes.", "rejected": "No."},
            "the last message is not",
        ),
    ],
)
def test_rows_that_do_not_fit_their_format_are_broken(tmp_path, dataset, row, reason):
    (found,) = read(jsonl(tmp_path / "x.jsonl", [row]), dataset)
    assert isinstance(found, Broken) and found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("part", "row", "expected"),
    [
        ("domain", {"text": "x", "source": "y"}, "plain_text (text)"),
        ("instruction", {"instruction": "a", "input": "b", "output": "c"}, None),
        ("instruction", {"messages": [USER, REPLY], "prompt": "x"}, "messages (messages)"),
        ("instruction", {**ASKED, "messages": [USER, REPLY]}, "messages (messages)"),
        ("instruction", {"conversations": shared(USER, REPLY)}, "sharegpt (conversations)"),
        ("instruction", {**ASKED, "text": "both"}, "prompt_completion (prompt, completion)"),
        ("domain", {**ASKED, "text": "both"}, "plain_text (text)"),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference (prompt, chosen, rejected)",
        ),
    ],
)
def test_auto_recognises_the_format_and_says_so(tmp_path, capsys, part, row, expected):
    path = write(tmp_path / "x.jsonl", "not JSON\n" + json.dumps(row) + "\n")
    values = {
        other: [{"dataset": "auto", "path": str(path)}] if other == part else [{"dataset": known}]
        for other, known in (
            ("domain", "mondo_text"),
            ("instruction", "refusals"),
            ("preference", "safety_catalogue"),
        )
    }
    config = build([("test", {"model_type": "test", "data": values})])
    preparation.check_sources(config)
    expected = expected or "alpaca (instruction, output, input)"
    assert f"{path}: recognised as {expected}" in capsys.readouterr().out
    (source,) = getattr(config.data, part)
    assert source.dataset == expected.split(" ")[0]


def test_auto_takes_named_columns_and_refuses_what_does_not_fit(tmp_path):
    path = str(jsonl(tmp_path / "x.jsonl", [{"question": "a", "answer": "b"}]))
    columns = {"prompt": "question", "completion": "answer"}
    named = SourceSection(dataset="auto", path=path, columns=columns)
    assert formats.recognise(named, "instruction") == "prompt_completion"
    with pytest.raises(UserError) as error:
        formats.recognise(SourceSection(dataset="auto", path=path), "instruction")
    message = str(error.value)
    assert (
        f"{path}, line 1: the columns 'question', 'answer' are those of no known format" in message
    )
    for name in formats.FORMATS:
        assert name in message
    assert "    columns: {prompt: question, completion: answer}" in message
    with pytest.raises(UserError, match=r"prompt_completion, which belongs in data\.instruction"):
        formats.recognise(named, "domain")
    with pytest.raises(UserError, match="no readable row"):
        empty = write(tmp_path / "empty.jsonl", "")
        formats.recognise(SourceSection(dataset="auto", path=str(empty)), "domain")


def test_a_missing_column_is_an_error_with_the_line_to_write(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"question": "a", "completion": "b"}])
    with pytest.raises(UserError) as error:
        read(path, "prompt_completion")
    message = str(error.value)
    assert f"{path}, line 1: dataset 'prompt_completion' needs a column 'prompt', found" in message
    assert "'question', 'completion'" in message and "columns: {prompt: question}" in message
    other = jsonl(tmp_path / "y.jsonl", [{"about": "a", "completion": "b"}])
    with pytest.raises(UserError, match="columns: {prompt: THE_COLUMN}"):
        read(other, "prompt_completion")
    assert read(path, "prompt_completion", columns={"prompt": "question"})[0]["prompt"] == "a"
    with pytest.raises(UserError, match="needs a column 'qestion'"):
        read(path, "prompt_completion", columns={"prompt": "qestion"})
    with pytest.raises(
        UserError, match=r"no column 'promt' .* Allowed: prompt, completion, system, tools, entity"
    ):
        read(path, "prompt_completion", columns={"prompt": "question", "promt": "question"})


def test_labels_are_text_whatever_they_were(tmp_path):
    rows = [{"text": "A text.", "entity": 12}, {"text": "Another.", "entity": ["a", "b"]}]
    found = read(jsonl(tmp_path / "x.jsonl", rows))
    assert [row["entity"] for row in found] == ["12", "['a', 'b']"]


# --- the hub datasets of the Phi configurations ---------------------------------------------------

# Hub id -> fixture, in the layout that the dataset has:
# - the textbooks are text files with one text a line (the hub's own tag for it: format text), which
#   the hub's library reads as one row a line with a column `text`, empty lines included;
# - both collections have instruction, input, output (and an index column that pandas left behind:
#   not documented, seen in other copies of these files);
# - the preference dataset's card was not to be found. A dataset of the same name by another author
#   documents prompt, chosen, rejected, all text; the fixture has these.
LAYOUTS = {
    "Medilora/us_medical_license_exam_textbooks_en": "textbooks",
    "lavita/medical-qa-datasets": "lavita_all_processed.jsonl",
    "Malikeh1375/medical-question-answering-datasets": "malikeh1375_all_processed.jsonl",
    "Julian2002/Medical-ChatBot-DPO": "julian2002_medical_chatbot_dpo.jsonl",
}


def _rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (FIXTURES / name).read_text().splitlines()]


@pytest.mark.parametrize("shipped", ["phi-2.yaml", "phi-1_5.yaml", "phi-2_8gb.yaml"])
def test_the_shipped_sources_have_a_fixture_in_their_layout(shipped):
    data = read_yaml(ROOT / "configs" / shipped)["data"]
    assert {s["hub"] for part in data.values() for s in part if "hub" in s} == set(LAYOUTS)


def test_the_phi_data_are_prepared_from_files_in_the_layout_of_the_hub(tmp_path):
    data = read_yaml(ROOT / "configs/phi-2.yaml")["data"]
    expected = {}
    for part in ("domain", "instruction", "preference"):
        for number, source in enumerate(data[part]):
            if "hub" not in source:
                continue
            fixture = LAYOUTS[source.pop("hub")]
            source.pop("config_name", None)
            source["path"] = str(FIXTURES / fixture)
            if fixture == "textbooks":
                lines = [
                    line
                    for file in sorted((FIXTURES / fixture).glob("*.txt"))
                    for line in file.read_text().splitlines()
                ]
                expected[part, number] = {(line,) for line in lines if line}
            elif part == "instruction":
                # The hub stores these as parquet.
                path = tmp_path / f"{fixture}.parquet"
                pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows(fixture)), path)
                source["path"] = str(path)
                expected[part, number] = {
                    (row["input"] or row["instruction"], row["output"]) for row in _rows(fixture)
                }
            else:
                expected[part, number] = {
                    (row["prompt"], row["chosen"], row["rejected"]) for row in _rows(fixture)
                }
    assert sorted(map(len, expected.values())) == [8, 10, 10, 12]
    data |= {"validation_share": 0.3, "test_share": 0.3, "seed": 1}
    values = {"extends": str(ROOT / "configs/phi-2.yaml"), "model_type": "fixtures", "data": data}
    config = tmp_path / "fixtures.yaml"
    config.write_text(yaml.safe_dump(values))
    shown = succeed(
        ROOT / "prepare_datasets.py", "--config", config, "--output", tmp_path / "out", cwd=tmp_path
    )
    assert "not read: README.md" in shown
    entries = json.loads((tmp_path / "out/manifest.json").read_text())["sources"]
    for (part, number), rows in expected.items():
        name = data[part][number]["dataset"]
        found = [
            row
            for split in SPLITS
            for row in load_split(tmp_path / "out", part, split)
            if row["dataset"] == name
        ]
        texts = {tuple(row[field] for field in FIELDS[part]) for row in found}
        assert texts >= rows, (part, number)
        (entry,) = [e for e in entries if e["path"] == data[part][number]["path"]]
        assert entry["rows_read"] == entry["rows_kept"] == len(rows) and entry["dropped"] == {}


def test_a_hub_dataset_comes_through_the_hubs_own_library(tmp_path, monkeypatch):
    """The directory stands for the hub: the library reads both by the same path."""
    monkeypatch.setattr(readers.hub, "commit", lambda repository: "0" * 40)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "hub"
    for name in ("Anatomy_Basics.txt", "Physiology_Basics.txt"):
        write(hub / name, (FIXTURES / "textbooks" / name).read_text())
    source = SourceSection(dataset="plain_text", hub=str(hub))
    found = list(formats.formatted(source, tmp_path))
    lines = [row["text"] for row in found]
    assert len([line for line in lines if line]) == 12 and "" in lines
    first = [place for place, _ in readers.read_rows(source)][0]
    assert first == f"{hub}, row 1"
    capped = source.model_copy(update={"limit": 4})
    assert len(list(formats.formatted(capped, tmp_path))) == 4
    with pytest.raises(UserError) as error:
        list(formats.formatted(source.model_copy(update={"split": "holdout"}), tmp_path))
    assert "holdout" in str(error.value) and "train" in str(error.value)


def test_a_limit_is_one_of_each_split_of_a_hub_dataset(tmp_path, monkeypatch):
    """They come one after the other: the held-out ones would never be reached, and nothing else
    would be held out in their place."""
    monkeypatch.setattr(readers.hub, "commit", lambda repository: "0" * 40)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("train", "test"):
        rows = [{"prompt": f"Which {name} {n}?", "completion": "It is so."} for n in range(9)]
        jsonl(tmp_path / f"hub/{name}.jsonl", rows)
    source = SourceSection(
        dataset="prompt_completion", hub=str(tmp_path / "hub"), split="train+test", limit=4
    )
    found = list(formats.formatted(source, tmp_path))
    assert [row.get("split") == "test" for row in found] == [False] * 4 + [True] * 4


def test_a_folder_that_is_called_as_a_hub_dataset_is_not_taken_for_it(tmp_path, monkeypatch):
    jsonl(tmp_path / "owner/name/train.jsonl", [{"text": "One."}])
    monkeypatch.chdir(tmp_path)
    source = SourceSection(dataset="plain_text", hub="owner/name")
    with pytest.raises(UserError, match="also the name of a folder here"):
        list(formats.formatted(source, tmp_path))


@pytest.mark.parametrize("kind", ["script", "no files"])
def test_a_dataset_that_is_a_script_is_the_users_to_change(tmp_path, monkeypatch, kind):
    import datasets

    errors = {
        "script": RuntimeError("Dataset scripts are no longer supported, but found pubhealth.py"),
        "no files": datasets.exceptions.DataFilesNotFoundError("No (supported) data files found"),
    }

    def load_dataset(*_, **__):
        raise errors[kind]

    monkeypatch.setattr(readers.hub, "commit", lambda repository: "0" * 40)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = SourceSection(dataset="plain_text", hub="bigbio/pubhealth")
    with pytest.raises(UserError, match=r"(?s)without running code .* refs/convert/parquet"):
        list(formats.formatted(source, tmp_path))


# --- wheels as zip files --------------------------------------------------------------------------


def _zip(path: Path, *names: str) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, "content " * 100)
    return path


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/etc/evil", "C:/evil", "..\\evil.txt"]
)
def test_an_archive_with_a_member_outside_of_itself_is_refused(tmp_path, name):
    path = _zip(tmp_path / "x.whl", "data.json", name)
    with pytest.raises(UserError, match="points outside of the archive") as error:
        read_member(path, "data.json")
    assert "x.whl" in str(error.value) and "Delete the file" in str(error.value)
    assert not list(tmp_path.parent.glob("evil*"))


def test_names_with_dots_are_ordinary(tmp_path):
    path = _zip(tmp_path / "x.whl", "a..b/data..json")
    assert read_member(path, "a..b/data..json").startswith(b"content")


def test_a_member_that_unpacks_to_more_than_2_gb_is_refused_unread(tmp_path, monkeypatch):
    path = _zip(tmp_path / "x.whl", "data.json")
    raw = bytearray(path.read_bytes())
    at = raw.rindex(b"PK\x01\x02") + 24  # the size that the archive's directory declares
    raw[at : at + 4] = (2_000_000_001).to_bytes(4, "little")
    path.write_bytes(raw)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match="unpacks to 2,000,000,001 bytes"):
        read_member(path, "data.json")


def test_what_is_no_zip_or_is_damaged_is_an_error(tmp_path):
    path = _zip(tmp_path / "x.whl", "data.json")
    whole = path.read_bytes()
    with pytest.raises(UserError, match=r"no member other\.json"):
        read_member(path, "other.json")
    damaged = {
        "not a zip": b"not a zip",
        "truncated": whole[: len(whole) // 2],
        "encrypted": whole.replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
        ),
    }
    for name, content in damaged.items():
        assert content != whole, name
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.whl: cannot read data\.json"):
            read_member(path, "data.json")
    # One byte of the packed content after the other: bad codes, a bad sum, an end too early.
    for at in range(39, whole.index(b"PK\x01\x02")):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(UserError, match=r"x\.whl: cannot read data\.json"):
            read_member(path, "data.json")
    with pytest.raises(UserError, match="cannot read"):
        read_member(tmp_path / "none.whl", "data.json")


def test_a_wheel_whose_sha256_differs_is_named_and_not_used(tmp_path, monkeypatch, capsys):
    wheel = WHEELS["gnuhealth-genetics-uniprot"]
    name = f"gnuhealth_genetics_uniprot-{wheel.version}-py3-none-any.whl"
    (tmp_path / "wheels").mkdir()
    path = _zip(tmp_path / "wheels" / name, "data.xml")
    answer = {"returncode": 1, "stdout": "", "stderr": "ERROR: no index"}

    def no_index(*_args, **_kwargs):
        return wheels.subprocess.CompletedProcess([], **answer)

    monkeypatch.setattr(wheels.subprocess, "run", no_index)
    with pytest.raises(UserError) as error:
        fetch_wheel(wheel.name, tmp_path)
    assert f"{path} is there, but its sha256 differs" in str(error.value)
    assert wheel.sha256 in str(error.value)
    assert "not the pinned file" in capsys.readouterr().out
    assert path.is_file(), "the user's file is not deleted while there is nothing better"

    def another_file(command, **_kwargs):
        _zip(Path(command[command.index("--dest") + 1]) / name, "data.xml")
        return wheels.subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", another_file)
    with pytest.raises(WorkError, match="not the pinned file"):
        fetch_wheel(wheel.name, tmp_path)
    pinned = dataclasses.replace(wheel, sha256=sha256_file(path))
    monkeypatch.setitem(WHEELS, wheel.name, pinned)
    assert fetch_wheel(wheel.name, tmp_path) == path


def test_a_wheel_that_two_commands_need_at_once_is_downloaded_once(tmp_path, monkeypatch, capsys):
    """The second waits, then finds it: neither removes what the other is writing."""
    wheel = WHEELS["gnuhealth-genetics-uniprot"]
    name = f"gnuhealth_genetics_uniprot-{wheel.version}-py3-none-any.whl"
    digest = sha256_file(_zip(tmp_path / name, "data.xml"))
    monkeypatch.setitem(WHEELS, wheel.name, dataclasses.replace(wheel, sha256=digest))
    downloads = []

    def slowly(command, **_kwargs):
        downloads.append(command)
        time.sleep(0.5)
        shutil.copy(tmp_path / name, command[command.index("--dest") + 1])
        return wheels.subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(wheels.subprocess, "run", slowly)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: fetch_wheel(wheel.name, tmp_path), range(3)))
    assert set(found) == {tmp_path / "wheels" / name}
    assert len(downloads) == 1 and capsys.readouterr().out.count("downloading") == 1
