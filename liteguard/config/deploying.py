"""What may be set of the bundle and of its proof."""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    PositiveInt,
    field_validator,
    model_validator,
)

from liteguard.config.data import Section

# Quantisation: name -> what it does; `benchmarks/bench_recipes.py` prints size, perplexity and
# speed of each.
RECIPES = {
    "int8": "8-bit weights, activations rounded to 8 bits as they come (fastest)",
    "int8_mixed": "8-bit weights; activations in float32 where they have outliers (FFN outputs)",
    "int8_weight_only": "8-bit weights, float32 activations (exact, slow, four times the memory)",
    "mixed": "4-bit FFN in blocks of 32, 8-bit attention, embedding and output layer",
    "int4_block32": "4-bit FFN and attention in blocks of 32, 8-bit embedding and output layer",
    "int4_block64": "the same in blocks of 64",
    "fp16": "16-bit float weights",
    "none": "float32",
}


# LiteRT-LM refuses a message once fewer places of its cache are free than the shortest prefill has:
# with 1 a conversation can use all of them. The others keep what is left fast.
SHORT_PREFILLS = (1, 8, 64)
# What "auto" tries, each more exact and larger or slower than the one before.
AUTO = ("int8", "int8_mixed", "int8_weight_only", "fp16")


class VerifySection(Section):
    """How a finished bundle is compared with the merged model, and what may differ."""

    level: Literal["quick", "full", "none"] = Field(
        "quick", description="full measures the float32 TFLite as well; none proves nothing."
    )
    questions: int = Field(12, ge=1, description="Held-out questions to answer.")
    requests: int = Field(24, ge=1, description="Harmful, ordinary and borderline ones to answer.")
    texts: int = Field(
        8,
        ge=2,
        description="Texts, and as many answers, to score at first; more follow until the change "
        "of the perplexity is known to a quarter of its tolerance (one standard error).",
    )
    max_new_tokens: int = Field(
        256,
        ge=8,
        description="Most tokens of an answer; less where three of four held-out answers are "
        "shorter.",
    )
    max_text_tokens: int = Field(
        64, ge=8, description="How much of a text is scored; a word counts as two."
    )
    tokenizer_texts: int = Field(3000, ge=1, description="Held-out texts to tokenize twice.")
    perplexity_change: float | None = Field(
        None,
        gt=0,
        description="Largest change against the merged model; default: 0.01 with weights of 8 bits "
        "and more, 0.1 with 4-bit ones.",
    )
    identical_ids: float = Field(
        0.999, gt=0, le=1, description="Share of texts with the ids of the model's tokenizer."
    )
    agreement: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of answers whose first 16 tokens are the merged model's, or that part "
        "where the bundle finds its token as good (within 1 nat).",
    )
    stopped: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Share, of the answers that the merged model ends by itself, that the bundle "
        "ends too.",
    )
    refusal_change: float = Field(
        0.02, ge=0, le=1, description="Change of the refusal rate; one request is always allowed."
    )

    def perplexity_limit(self, recipe: str) -> float:
        """`perplexity_change`, or the default for a recipe."""
        return self.perplexity_change or (0.1 if recipe.startswith(("int4", "mixed")) else 0.01)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


class CompressSection(Section):
    quantize: str = Field(
        "auto",
        description="auto: int8, and the next more exact one while the proof says that it loses "
        f"too much. Or one of {', '.join(RECIPES)}; or several, separated by commas: the first "
        "that passes.",
    )
    size_gb: float | None = Field(
        None,
        gt=0,
        description="Only recipes whose weights take at most so many GB (10^9 bytes); with "
        "quantize: auto, mixed or int4_block32 where 8 bits take more.",
    )
    calibrate: bool | Literal["all"] = Field(
        True,
        description="4-bit weights are chosen by what they do to training rows (GPTQ, fitted "
        "scales). all: 8-bit ones as well, which loses about half of what rounding them to the "
        "nearest does and takes as long. false: by the largest weight of each block; seconds "
        "instead of minutes, and several times the loss.",
    )
    calibration_tokens: int = Field(
        4096, ge=64, description="Tokens of training rows to calibrate on."
    )
    smooth: bool = Field(
        False,
        description="Recipes of 8 bits: move outliers of activations into the weights behind them, "
        "by powers of two, so that the function stays what it is to the last bit. It pays together "
        "with calibrate: all (docs/experiments.md). Left out, for all, where quantize names a "
        "recipe of 4 bits.",
    )
    prefill_lengths: list[PositiveInt] = Field(
        default_factory=lambda: [1024],
        min_length=1,
        description="A prompt is padded to one of these; short ones make short questions fast. "
        f"Those of {', '.join(map(str, SHORT_PREFILLS))} that are shorter than all of them are "
        "added: without them a conversation ends before its cache is full.",
    )
    kv_cache_length: int = Field(
        1280,
        ge=16,
        description="Tokens of prompt and answer together; shorter decodes faster.",
    )
    converter: Literal["auto", "v1", "v2"] = Field(
        "auto", description="Of litert-torch. auto: v2 where TensorFlow has its entry point."
    )
    required: bool = Field(
        True,
        description="Refuse to train what no bundle can be made of; false for a model that stays "
        "on a computer.",
    )
    python: str | None = Field(
        None,
        description="Python of another environment, which has requirements-convert.txt, to run the "
        "converter in; default: this one.",
    )
    verify: VerifySection = Field(
        default_factory=VerifySection, description="The proof, and what may differ."
    )

    @field_validator("quantize")
    @classmethod
    def _are_recipes(cls, names: str) -> str:
        unknown = [name for name in _split(names) if name not in RECIPES]
        if names != "auto" and unknown:
            raise ValueError(
                f"unknown recipe {unknown[0]!r}. Allowed, one or several separated by commas:\n"
                f"    {'auto':17} {', '.join(AUTO)}: the first that passes the proof\n"
                + "\n".join(f"    {known:17} {what}" for known, what in RECIPES.items())
            )
        return names

    @model_validator(mode="after")
    def _prompt_and_answer_share_the_cache(self) -> CompressSection:
        if max(self.prefill_lengths) >= self.kv_cache_length:
            raise ValueError(
                f"kv_cache_length {self.kv_cache_length} must exceed the longest of "
                f"prefill_lengths {self.prefill_lengths}: prompt and answer share the cache"
            )
        return self

    @property
    def ladder(self) -> list[int]:
        """Prefill lengths that are exported: `prefill_lengths`, with short ones below them."""
        shortest = min(self.prefill_lengths)
        return sorted({*self.prefill_lengths, *(n for n in SHORT_PREFILLS if n < shortest)})

    @property
    def recipes(self) -> tuple[str, ...]:
        """The recipes that `quantize` stands for, in the order in which they are tried."""
        return AUTO if self.quantize == "auto" else _split(self.quantize)
