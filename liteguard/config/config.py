"""The whole configuration, which every section is a part of."""

from __future__ import annotations

from typing import Any

from pydantic import (
    Field,
    model_validator,
)

from liteguard.config.data import DataSection, ModelSection, Section
from liteguard.config.deploying import CompressSection
from liteguard.config.measuring import EvaluateSection
from liteguard.config.training import DomainSection, InstructionSection, SafetySection
from liteguard.prompts import Prompt


class Config(Section):
    model_type: str = Field(
        "",
        pattern=r"^([A-Za-z0-9][A-Za-z0-9._-]{0,63})?$",
        description="Short name (letters, digits, . _ -); the data go to data/<model_type>.",
    )
    model: ModelSection = Field(default_factory=ModelSection)
    prompt: Prompt = Field(default_factory=Prompt)
    prompt_from_base: bool = Field(
        False, description="The base's own chat template; in a YAML: `prompt: from_base`."
    )
    data: DataSection = Field(default_factory=DataSection)
    domain: DomainSection = Field(default_factory=DomainSection)
    instruction: InstructionSection = Field(default_factory=InstructionSection)
    safety: SafetySection = Field(default_factory=SafetySection)
    compress: CompressSection = Field(default_factory=CompressSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)

    _sources: dict[str, str] = {}

    @model_validator(mode="before")
    @classmethod
    def _prompt_of_the_base(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("prompt") == "from_base":
            return {**values, "prompt": {}, "prompt_from_base": True}
        return values

    @model_validator(mode="after")
    def _lengths_fit_the_model(self) -> Config:
        limit = self.model.context_length
        long = [
            f"{name} {length}"
            for name, length in (
                ("compress.kv_cache_length", self.compress.kv_cache_length),
                ("evaluate.max_text_tokens", self.evaluate.max_text_tokens),
                ("evaluate.max_new_tokens", self.evaluate.max_new_tokens),
            )
            if length > limit
        ]
        if long:
            raise ValueError(f"longer than model.context_length {limit}: {', '.join(long)}")
        return self

    @property
    def sources(self) -> dict[str, str]:
        """'section.key' -> where its value came from, for every value that is not a default."""
        return self._sources
