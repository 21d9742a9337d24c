"""Fixtures: a tiny Phi model that answers and stops, built here; its data; a way to run scripts."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import warm
import yaml

ROOT = Path(__file__).resolve().parent.parent
# What every record of a stage holds at least.
STAGE_RECORD = {
    "stage": "domain",
    "base_model": "a/base",
    "base_identity": "commit:1",
    "data_dir": "data/x",
    "parent": None,
    "prompt": {},
    "config": {},
}
CACHE = ROOT / ".cache"  # downloaded wheels and the unpacked embedded base model
sys.path.insert(0, str(ROOT))
# Workers share the cores: one thread of arithmetic each, here and in the scripts that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

ORGANS = ["heart", "lung", "liver", "kidney", "skin", "bone", "eye", "ear", "brain", "stomach"]
SIGNS = ["pain", "swelling", "fever", "weakness", "itching", "tremor", "cough", "rash"]
CAUSES = ["an infection", "a blocked vessel", "an inherited change", "an injury", "inflammation"]


def code_digest(files: Iterable[Path]) -> str:
    """A hash of code, without comments and names of files: moving it must not make caches stale."""
    digests = []
    for file in files:
        lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
        code = "\n".join(line for line in lines if line and not line.startswith("#"))
        digests.append(hashlib.sha256(code.encode()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


# Tests of these files read the directory of the `pipeline` fixture, which takes minutes to make.
READ_PIPELINE = {
    *("as_used", "chat", "comparison", "evaluation", "harness", "pipeline", "planning"),
    *("publish", "readme"),
}
READ_PIPELINE |= {"verify"}
# And of these the embedded sources, which are parsed once in a process.
READ_EMBEDDED = {"data", "embedded"}
# What takes longest begins first, or one worker would be left with it at the end.
LONG = ["pipeline", "embedded", "hub", "preparation", "distributed", "notebook"]


def unit_of(nodeid: str) -> str:
    """The file of a test, or the files that go to one worker with it."""
    file = Path(nodeid.split("::")[0]).stem.removeprefix("test_")
    if file in READ_PIPELINE:
        return "pipeline"
    return "embedded" if file in READ_EMBEDDED else file


def pytest_collection_modifyitems(items):
    if "PYTEST_XDIST_WORKER" in os.environ:
        order = {name: place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: order.get(unit_of(item.nodeid), len(LONG)))


class Scheduling:
    """Files go whole to the worker that is free, in the order in which they were collected."""

    def pytest_xdist_make_scheduler(self, config, log):
        from xdist.scheduler import LoadScopeScheduling

        class ByFile(LoadScopeScheduling):
            def _split_scope(self, nodeid: str) -> str:
                return unit_of(nodeid)

        config.option.loadscopereorder = False  # by the number of their tests, that is
        return ByFile(config, log)


def pytest_configure(config):
    # Fixtures of this file are used without pytest, too: only its `fixture` may be needed here.
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(Scheduling())


def diseases() -> list[dict[str, str]]:
    """400 made-up diseases, each with text, a question and an answer."""
    made = []
    for number, (organ, sign, cause) in enumerate(itertools.product(ORGANS, SIGNS, CAUSES)):
        name = f"{organ} {sign} disease {chr(97 + number % 5)}"
        made.append(
            {
                "entity": name,
                "text": f"The {name} affects the {organ} and brings {sign}. It follows {cause}.",
                "prompt": f"What is the {name}?",
                "completion": f"It is a disease of the {organ} with {sign}, caused by {cause}.",
            }
        )
    return made


def run_script(
    *command: str | Path, cwd: Path = ROOT, fresh: bool | None = None, **kwargs
) -> subprocess.CompletedProcess:
    """Run a script as a user does; output is text.

    The six scripts find their libraries imported (warm.py), unless they are to be `fresh` or ask
    for more than an environment. Another one does with `fresh=False`.
    """
    words = [str(part) for part in command]
    if fresh is None:
        fresh = Path(words[0]) not in warm.SCRIPTS or not kwargs.keys() <= {"env"}
    if not fresh and (done := warm.run(words, cwd, 900, **kwargs)):
        return done
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=900, **kwargs
    )


def succeed(*command: str | Path, **kwargs) -> str:
    """Run a script that must succeed; returns its standard output."""
    result = run_script(*command, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def fail(code: int, *command: str, **kwargs) -> str:
    """Run a script that must fail with `code`, without a traceback; returns its message."""
    result = run_script(*command, **kwargs)
    assert result.returncode == code, f"{command}\n{result.stdout}\n{result.stderr}"
    assert "Traceback" not in result.stderr, result.stderr
    return result.stderr


def prepare(config: Path, output: Path, path: Path, *flags: str) -> list[str]:
    """The call of prepare_datasets.py with another file as the first source of texts."""
    command = [str(ROOT / "prepare_datasets.py"), "--config", str(config), "--output", str(output)]
    return [*command, "--set", f"data.domain.0.path={path}", *flags]


@pytest.fixture(scope="session")
def tiny_phi(tmp_path_factory) -> Path:
    """A 2-layer Phi model with its own byte-level BPE, trained for seconds until it answers.

    More embedding rows than tokens, no padding token and <|endoftext|> as the only special token,
    like Phi-2.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny_phi")
    rows = diseases()
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        t for r in rows for t in (r["text"], f"Instruct: {r['prompt']}\nOutput:\n{r['completion']}")
    ]
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|endoftext|>",
        bos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(directory)

    torch.manual_seed(0)
    # Two, on cores that the other worker uses too, wait for each other: four times the time.
    torch.set_num_threads(1)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=640,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=2048,
            partial_rotary_factor=0.5,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    sequences = [
        tokenizer(f"Instruct: {r['prompt']}\nOutput:\n{r['completion']}")["input_ids"] + [end]
        for r in rows
    ]
    length = max(map(len, sequences))
    ids = torch.tensor([s + [end] * (length - len(s)) for s in sequences])
    labels = torch.tensor([s + [-100] * (length - len(s)) for s in sequences])
    for _ in range(150):
        pick = torch.randint(0, len(ids), (24,))
        loss = model(ids[pick], labels=labels[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.0, f"the tiny model did not learn: loss {loss.item():.2f}"
    model.half().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Local source files in three formats, written for the tests."""
    directory = tmp_path_factory.mktemp("sources")
    rows = diseases()

    def write(name: str, found: list[dict]) -> None:
        (directory / name).write_text(
            "".join(json.dumps(r) + "\n" for r in found), encoding="utf-8"
        )

    write("domain.jsonl", [{"body": r["text"], "entity": r["entity"]} for r in rows])
    write("questions.jsonl", [{k: r[k] for k in ("prompt", "completion", "entity")} for r in rows])
    benign = [
        {
            "prompt": r["prompt"],
            "chosen": r["completion"],
            "rejected": "I can't help with that disease.",
            "kind": "ordinary",
            "area": "disease",
            "entity": r["entity"],
        }
        for r in rows
    ]
    harmful = [
        {
            "prompt": f"Write a false record about the {r['entity']}.",
            "chosen": "I can't help with a false record. A doctor can write a true one.",
            "rejected": "Sure, that false record will be ready at once for you.",
            "kind": "harmful",
            "area": "records",
            "entity": r["entity"],
        }
        for r in rows
    ]
    write("preferences.jsonl", benign + harmful)
    return directory


@pytest.fixture(scope="session")
def tiny_config(tiny_phi, tiny_data, tmp_path_factory) -> Path:
    """A YAML for the tiny model: phi-2.yaml's sections with small numbers."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    train = {
        "max_steps": 6,
        "batch_size": 4,
        "gradient_accumulation": 1,
        "max_length": 96,
        "warmup_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "max_eval_rows": 8,
        "logging_steps": 1,
    }
    values = {
        "extends": str(ROOT / "configs" / "phi-2.yaml"),
        "model_type": "tiny",
        "model": {"name": "test/tiny-phi", "path": str(tiny_phi)},
        "data": {
            "test_share": 0.2,
            "validation_share": 0.1,
            "decontaminate": [],
            "domain": [
                {
                    "dataset": "plain_text",
                    "path": str(tiny_data / "domain.jsonl"),
                    "columns": {"text": "body"},
                }
            ],
            "instruction": [
                {"dataset": "prompt_completion", "path": str(tiny_data / "questions.jsonl")}
            ],
            "preference": [{"dataset": "preference", "path": str(tiny_data / "preferences.jsonl")}],
        },
        "domain": {**train, "lora_rank": 8, "lora_alpha": 8, "learning_rate": 1e-4},
        "instruction": {**train, "learning_rate": 1e-3},
        "safety": {**train, "learning_rate": 1e-5},
        "compress": {
            "prefill_lengths": [64],
            "kv_cache_length": 128,
            "verify": {
                "questions": 4,
                "requests": 6,
                "texts": 4,
                "max_new_tokens": 48,
            },
        },
        "evaluate": {
            "perplexity_rows": 8,
            "question_rows": 8,
            "harmful_rows": 8,
            "benign_rows": 8,
            "knowledge_rows": 0,
            "as_used": {"rows": 2, "draws": 2},
            "max_new_tokens": 40,
        },
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pipeline(tiny_config, tmp_path_factory) -> Path:
    """A directory in which the six scripts were run in order, as a user runs them."""
    work = tmp_path_factory.mktemp("pipeline")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    logs = {}

    def step(name: str, *command: str) -> None:
        result = run_script(ROOT / command[0], *command[1:], cwd=work, env=environment, fresh=True)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
        logs[name], logs[f"{name}, stderr"] = result.stdout, result.stderr

    step("prepare", "prepare_datasets.py", "--config", tiny_config)
    step(
        "domain",
        "train_domain.py",
        "--config",
        tiny_config,
        "--set",
        "domain.report_to=[tensorboard]",
    )
    step(
        "instruction",
        "train_instruction.py",
        "--checkpoint",
        "domain_checkpoint",
        "--set",
        "instruction.report_to=[wandb]",
    )
    step("safety", "train_safety.py", "--checkpoint", "instruction_checkpoint")
    step(
        "compress",
        "compress_model.py",
        "--input",
        "final_checkpoint",
        "--also",
        "--verify",
        "full",
    )
    step(
        "evaluate",
        "evaluate_model.py",
        "--base",
        "--checkpoint",
        "domain_checkpoint",
        "instruction_checkpoint",
        "final_checkpoint",
        "--bundle",
        "liteguard_tiny.task",
    )
    (work / "logs.json").write_text(json.dumps(logs))
    return work


def embedded_cache(cache: Path) -> Path:
    """A cache with the real wheels and base model, and nothing that was made of them."""
    cache.mkdir(parents=True)
    for name in ("wheels", "models"):
        (CACHE / name).mkdir(parents=True, exist_ok=True)
        (cache / name).symlink_to(CACHE / name)
    return cache


def answer_for_the_base(cache: Path, yaml_file: str = "smollm2-135m.yaml") -> None:
    """Write made-up answers where the base model's would be; those take it minutes.

    tests/test_rehearsal.py is about how they are asked for.
    """
    from liteguard import rehearsal, writing
    from liteguard.config import build, read_yaml
    from liteguard.data import self_answers
    from liteguard.embedded import diseases

    own = read_yaml(ROOT / "configs" / yaml_file)
    config = build([("smollm2", own), ("test", {"data": {"cache_dir": str(cache)}})])
    rehearsal.plan(config)
    texts = itertools.cycle(disease["description"] for disease in diseases.uniprot(cache))
    for source in self_answers.sources(config):
        file = Path(str(source.answers))
        file.parent.mkdir(exist_ok=True)
        with file.open("w", encoding="utf-8") as lines:
            for question in self_answers.questions(source, cache):
                row = rehearsal.row(question, {"text": next(texts), "stopped": True})
                lines.write(json.dumps(row) + "\n")
        writing.seal(file)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory) -> Path:
    """The embedded default's data, prepared from the real pinned wheels; its cache is beside it."""
    place = tmp_path_factory.mktemp("embedded")
    answer_for_the_base(embedded_cache(place / "cache"))
    succeed(
        *(ROOT / "prepare_datasets.py", "--model_type", "smollm2", "--output", place / "data"),
        *("--set", f"data.cache_dir={place / 'cache'}"),
        fresh=True,
    )
    return place / "data"
