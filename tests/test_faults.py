"""Killed before any change of a file, run again: the same result, nothing lost, nothing left over.

A cheap sample of benchmarks/fault_matrix.py, which does the same with the six real scripts.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks.kill_points import every_kill
from liteguard import checkpoints, machine, writing
from liteguard.config import Config
from liteguard.errors import UserError
from liteguard.evaluation.journal import Journal
from liteguard.export import gguf_file, outputs
from liteguard.records import BundleRecord

sys.path.insert(0, str(ROOT / "benchmarks"))
import fault_inputs  # noqa: E402

INPUTS = {"stage": "domain", "rate": 2}
FILES = ["adapter_model.safetensors", "adapter_config.json", "parts/table.json"]


def tree(directory: Path) -> dict[str, str]:
    """Every file below a directory -> its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes().decode()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def stand(tmp_path, monkeypatch):
    """A directory that is put back to how it was when `keep` was called, for each kill."""

    class Stand:
        place = tmp_path / "place"
        kept = tmp_path / "kept"

        def keep(self) -> None:
            self.forget_locks()
            shutil.rmtree(self.kept, ignore_errors=True)
            shutil.copytree(self.place, self.kept)

        def back(self) -> None:
            self.forget_locks()
            shutil.rmtree(self.place, ignore_errors=True)
            shutil.copytree(self.kept, self.place)

        @staticmethod
        def forget_locks() -> None:
            """The system drops the locks of a process that was killed; their files stay."""
            for lock in [*machine._claims]:
                machine._claims.pop(lock).close()

    monkeypatch.setattr(writing.os, "fsync", lambda descriptor: None)  # it changes no content
    found = Stand()
    found.place.mkdir()
    yield found
    found.forget_locks()


def train(work: Path, content: str) -> None:
    """What a stage writes at its end; that of a best step which is not the last one."""
    best = work / "trainer/checkpoint-1/best"
    best.parent.mkdir(parents=True, exist_ok=True)
    best.write_text(content)
    for name in FILES:
        (work / name).parent.mkdir(exist_ok=True)
        (work / name).write_text(f"{content} {name}")


@pytest.mark.parametrize("exchange", [True, False], ids=["exchanged", "moved aside"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_every_kill_of_publishing(stand, monkeypatch, overwrite, exchange):
    if not exchange:  # a file system on which two directories cannot change places
        monkeypatch.setattr(writing, "_exchange", lambda one, other: False)
    output = stand.place / "out"

    def publish(work: Path) -> None:
        checkpoints.publish(work, output, {"stage": "domain"}, FILES)

    if overwrite:
        work = checkpoints.open_work(output, {"stage": "domain", "rate": 1})
        train(work, "old")
        publish(work)
    old = tree(output)
    work = checkpoints.open_work(output, INPUTS, overwrite)
    train(work, "new")
    stand.keep()
    publish(work)
    wanted = tree(output)
    counts = {"went on": 0, "was finished": 0, "anew": 0}
    for count in every_kill(stand.place, stand.back, lambda: publish(work)):
        stand.forget_locks()
        left = tree(output)
        gap = overwrite and not exchange  # between two renames, mended by the next run
        assert left in (old, wanted) or (gap and not left), f"kill {count}"
        # The same command again.
        again = checkpoints.open_work(output, INPUTS, overwrite)
        if again is None:
            counts["was finished"] += 1
        elif left == wanted:  # everything was done: with --overwrite it is done once more
            counts["anew"] += 1
            train(again, "new")
            publish(again)
        else:
            counts["went on"] += 1
            assert tree(output) == old, f"kill {count}: the old result is there until the new one"
            train(again, (again / "trainer/checkpoint-1/best").read_text())  # or it was lost
            publish(again)
        assert tree(output) == wanted, f"kill {count}"
        names = {path.name for path in stand.place.iterdir()}
        assert names <= {"out", ".out.lock"}, f"kill {count} left {names}"
    assert counts["went on"] > 5 and counts["was finished"] > 5 and counts["anew"] < 3, counts


@pytest.mark.parametrize("also", [False, True], ids=["one bundle", "two bundles"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwritten"])
def test_every_kill_while_bundles_get_their_names(stand, overwrite, also):
    bundles = [stand.place / "x.task", stand.place / "x.litertlm"][: 1 + also]

    def convert(work: Path, content: str) -> None:
        for path in bundles:
            (work / path.name).write_text(f"{content} {path.name}")
        (work / "merged").mkdir()
        (work / "merged/weights").write_text("kept")

    def publish(work: Path, inputs: dict) -> None:
        found = {path.name: checkpoints.sha256_file(work / path.name) for path in bundles}
        record = BundleRecord.model_construct(inputs=inputs, files=found)
        outputs.publish(work, bundles, record, {"bundles": found}, {"models": [found]})

    def command(inputs: dict) -> str:
        """As compress_model.py goes on."""
        outputs.check(bundles)
        if outputs.finish_publishing(bundles[0], inputs):
            return "was finished"
        if not overwrite and is_there(inputs):
            return "was finished"
        work = outputs.start_work(bundles[0], inputs)
        if not (work / "merged").exists():
            convert(work, "new")
            publish(work, inputs)
            return "anew"
        assert (work / "merged/weights").read_text() == "kept"
        publish(work, inputs)
        return "went on"

    def is_there(inputs: dict) -> bool:
        """`outputs.reuse` for records of this test, which have no more than it looks at."""
        if not bundles[0].exists():
            return False
        for path in bundles:
            record = json.loads(path.with_name(f"{path.name}.json").read_text())
            assert record["inputs"] == inputs
            assert record["files"][path.name] == checkpoints.sha256_file(path)
        return True

    if overwrite:
        work = outputs.start_work(bundles[0], {"a": 1})
        convert(work, "old")
        publish(work, {"a": 1})
    old = {name: text for name, text in tree(stand.place).items() if not name.endswith(".lock")}
    work = outputs.start_work(bundles[0], {"a": 2})
    convert(work, "new")
    stand.keep()
    publish(work, {"a": 2})
    names = [f"{path.name}{end}" for path in bundles for end in ("", ".json")]
    names += ["x.deploy.json", "x.gallery.json"]
    wanted = {name: (stand.place / name).read_text() for name in names}
    counts: dict[str, int] = {}
    for count in every_kill(stand.place, stand.back, lambda: publish(work, {"a": 2})):
        stand.forget_locks()
        if not (work / checkpoints.PUBLISHING).exists() and work.exists() and any(work.iterdir()):
            assert {**tree(stand.place), **old} == tree(stand.place), f"kill {count}: changed"
        done = command({"a": 2})
        counts[done] = counts.get(done, 0) + 1
        left = {n: text for n, text in tree(stand.place).items() if not n.endswith(".lock")}
        assert left == wanted, f"kill {count}, {done}"
    assert counts["went on"] > 3 and counts["was finished"] > 5, counts
    assert counts.get("anew", 0) < 3, counts


def test_every_kill_of_a_measurement(stand):
    """The journal and the result that takes its place; a header of other inputs is as long."""
    path, result = stand.place / "final.partial.jsonl", stand.place / "final.json"

    def measure(inputs: dict) -> None:
        if checkpoints.read_dict(result) is None:
            with Journal(path, inputs) as journal:
                for row in range(2):
                    if row not in journal.found["scores"]:
                        journal.add("scores", row, [-float(inputs["a"]), row])
                checkpoints.write_json(result, {"scores": journal.found["scores"], "a": inputs})
                journal.remove()
        Journal.drop(path, inputs)

    with Journal(path, {"a": 1}) as journal:
        for row in range(2):
            journal.add("scores", row, [-1.0, row])
    stand.keep()
    measure({"a": 2})
    wanted = tree(stand.place)
    assert [*wanted] == ["final.json"]
    kills = 0
    for kills in every_kill(stand.place, stand.back, lambda: measure({"a": 2})):
        measure({"a": 2})
        assert tree(stand.place) == wanted, f"kill {kills}"
    assert kills >= 5


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["file", "directory"])
def test_every_kill_of_a_replacement(stand, kind, shared):
    """What lies in a cache is the old or the new, and what a kill left does not grow."""
    path = stand.place / "x"

    def write(content: str) -> None:
        with writing.replacing(path, shared) as beside:
            if kind == "file":
                beside.write_text(content)
            else:
                beside.mkdir()
                (beside / "a").write_text(content)

    def read() -> str:
        return (path if kind == "file" else path / "a").read_text()

    write("old")
    stand.keep()
    for _ in every_kill(stand.place, stand.back, lambda: write("new")):
        assert read() in ("old", "new")
        write("new")
        assert read() == "new" and [p.name for p in stand.place.iterdir()] == ["x"]
    with pytest.raises(ZeroDivisionError), writing.replacing(path) as beside:
        beside.write_text("half")
        raise ZeroDivisionError
    assert read() == "new" and [p.name for p in stand.place.iterdir()] == ["x"]


def test_a_directory_with_files_of_others_is_not_replaced(tmp_path):
    output = tmp_path / "out"
    work = checkpoints.open_work(output, INPUTS)
    train(work, "old")
    checkpoints.publish(work, output, {"stage": "domain"}, FILES)
    (output / "notes.txt").write_text("mine")
    assert checkpoints.open_work(output, INPUTS) is None, "to be read it need not be replaced"
    with pytest.raises(UserError, match=r"not made by this command: notes\.txt"):
        checkpoints.open_work(output, INPUTS, overwrite=True)
    (output / "notes.txt").unlink()
    assert checkpoints.open_work(output, INPUTS, overwrite=True)


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_of_others_in_the_place_of_work_is_left(tmp_path, name, overwrite):
    output = tmp_path / "out"
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("mine")
    message = rf"{name.replace('.', '[.]')} was not made by LiteGuard"
    with pytest.raises(UserError, match=message):
        checkpoints.check_output(output, INPUTS)
    with pytest.raises(UserError, match=message):
        checkpoints.open_work(output, INPUTS, overwrite)
    assert tree(tmp_path) == {f"{name}/thesis.txt": "mine"}
    (tmp_path / name / "thesis.txt").unlink()
    assert checkpoints.open_work(output, INPUTS, overwrite), "an empty one is nobody's"


def test_every_kill_while_work_is_thrown_away(stand):
    """What is left of it is still ours, and nobody goes on from the half of a trainer's state."""
    output = stand.place / "out"
    work = checkpoints.open_work(output, {"stage": "domain", "rate": 1})
    train(work, "old")
    stand.keep()
    kills = 0
    for kills in every_kill(
        stand.place, stand.back, lambda: checkpoints.open_work(output, INPUTS, overwrite=True)
    ):
        stand.forget_locks()
        whole = tree(stand.kept / ".out.partial")
        begun = checkpoints.begun_from(work)
        assert begun in (None, INPUTS) or tree(work) == whole, f"kill {kills}"
        assert checkpoints.open_work(output, INPUTS, overwrite=True) == work
        assert sorted(tree(work)) == [writing.MARK, checkpoints.INPUTS], f"kill {kills}"
    assert kills > 5


@pytest.mark.parametrize("name", ["x.task", "x.task.json", "x.deploy.json", "x.gallery.json"])
def test_what_a_bundle_cannot_replace_is_refused_before_the_work(tmp_path, name):
    bundles = [tmp_path / "x.task"]
    outputs.check(bundles)
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        outputs.check(bundles)
    if name.endswith(".json"):
        (tmp_path / name).rmdir()
        (tmp_path / name).write_text('{"my": "notes"}')
        with pytest.raises(UserError, match="was not written by LiteGuard"):
            outputs.check(bundles)
        assert (tmp_path / name).read_text() == '{"my": "notes"}'


@pytest.mark.parametrize("kind", ["link", "dangling link", "bundle", "damaged bundle"])
def test_a_bundle_of_others_is_not_replaced(tmp_path, kind):
    """Only one whose record beside it names its sha256, or one that a kill cut while publishing."""
    bundle, record = tmp_path / "x.task", tmp_path / "x.task.json"
    if "link" in kind:
        bundle.symlink_to("victim")
    else:
        bundle.write_text("a bundle")
    if kind == "link":
        (tmp_path / "victim").write_text("mine")
    if kind == "damaged bundle":
        record.write_text('{"files": {"x.task": "0"}}')
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"x\.task (is a link|was not written by LiteGuard)"):
        outputs.check([tmp_path / "x.litertlm", bundle])
    assert tree(tmp_path) == before and bundle.is_symlink() == ("link" in kind)
    if kind == "bundle":
        files = {bundle.name: checkpoints.sha256_file(bundle)}
        work = outputs.start_work(bundle, {})
        checkpoints.write_json(work / checkpoints.PUBLISHING, files)
        outputs.check([bundle])
        outputs.finish_publishing(bundle, {})
        record.write_text(json.dumps({"files": files}))
        outputs.check([tmp_path / "x.litertlm", bundle])


@pytest.mark.parametrize("name", ["x.gguf", "x.gguf.json", ".x.gguf.partial/thesis.txt"])
def test_a_gguf_of_others_is_not_replaced(tmp_path, name):
    gguf_file.check_place(tmp_path / "x.gguf")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="not (written|made) by LiteGuard"):
        gguf_file.check_place(tmp_path / "x.gguf")
    (tmp_path / "x.gguf.json").write_text('{"tensors": {}}')
    if not name.startswith("."):
        gguf_file.check_place(tmp_path / "x.gguf")


def test_both_containers_of_a_name_are_one_output(tmp_path, monkeypatch):
    """They share two records: made in either order, by one command at a time."""
    task, other = tmp_path / "x.task", tmp_path / "x.litertlm"
    work = outputs.start_work(task, {"a": 1})
    with monkeypatch.context() as another_process:
        another_process.setattr(machine, "_claims", {})
        with pytest.raises(UserError, match=r"x\.litertlm is being made by process"):
            outputs.start_work(other, {"a": 2})
        outputs.start_work(tmp_path / "y.task", {"a": 2})
    (work / "x.task").write_text("new")
    checkpoints.write_json(work / checkpoints.PUBLISHING, {"x.task": "0"})
    outputs.finish_publishing(other, {})  # what a kill cut is not left to come back later
    assert task.read_text() == "new" and not work.exists()


def test_no_setting_takes_a_value_of_another_type(tmp_path):
    """Every setting of the schema; of the 1,500 wrong values of the whole matrix one in 24."""
    cases = [
        (name, value)
        for name, kind in fault_inputs.fields(Config)
        for value in fault_inputs.wrong_values(kind)
    ]
    assert len(cases) > 800
    path, accepted = tmp_path / "wrong.yaml", []
    for name, value in cases[::24]:
        path.write_text(fault_inputs.HEAD + fault_inputs._yaml(name, value))
        done = fault_inputs._resolve(path)
        if (done.code, done.traceback) != (2, False):
            accepted.append((name, value[:20], done.err[:200]))
    assert not accepted
