"""The whole configuration, which every section is a part of."""

from __future__ import annotations

from typing import Any

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, model_validator

from liteguard.config.data import DataSection, ModelSection, Section
from liteguard.config.deploying import CompressSection
from liteguard.config.measuring import EvaluateSection
from liteguard.config.training import DomainSection, InstructionSection, SafetySection
from liteguard.errors import UserError
from liteguard.prompts import Prompt

FROM_BASE = "from_base"
# Stand for the base's tokens while only what is set beside `from_base` can be looked at: that a
# padding token is no end can be said of the whole prompt alone.
_UNKNOWN = {"end_token": "\0", "document_end_token": "\0", "pad_token": "\0pad"}


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
    _over_base: dict[str, Any] = {}  # keys of the prompt beside `from_base`

    @model_validator(mode="wrap")
    @classmethod
    def _prompt_of_the_base(cls, values: Any, handler: ModelWrapValidatorHandler[Config]) -> Config:
        """`prompt: from_base`, which keys of upper layers may stand beside (layers.deep_merge)."""
        given = values.get("prompt") if isinstance(values, dict) else None
        over = {} if given == FROM_BASE else dict(given) if isinstance(given, dict) else None
        if over is None or (given != FROM_BASE and FROM_BASE not in over):
            return handler(values)
        if not over.pop(FROM_BASE, True):
            return handler({**values, "prompt": over})
        config = handler({**values, "prompt": {**_UNKNOWN, **over}, "prompt_from_base": True})
        config._over_base = over
        return config

    def with_prompt(self, prompt: Prompt, origin: str) -> Config:
        """The configuration with the prompt that `from_base` stands for; what upper layers set
        beside it stays. `origin`: where `prompt` comes from, for `sources`.

        Raises UserError where both together are no prompt.
        """
        try:
            whole = Prompt.model_validate({**prompt.model_dump(), **self._over_base})
        except ValidationError as error:
            what = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise UserError(
                f"prompt: {what}. It is {origin} with {', '.join(self._over_base)} set beside it."
            ) from None
        changed = self.model_copy(update={"prompt": whole, "prompt_from_base": False})
        found = {f"prompt.{key}": origin for key in whole.model_dump()}
        over = {f"prompt.{key}" for key in self._over_base}
        own = {key: name for key, name in self._sources.items() if key in over}
        changed._sources = self._sources | found | own
        changed._over_base = {}
        return changed

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
