"""THE prompt object: the only place that knows how a conversation becomes text.

Training data, the loss mask, evaluation, the merged model's chat template and the prompt prefixes
inside the `.task` bundle are all rendered from one `Prompt`. It is a section of the YAML, travels
in `stage.json`, and every stage compares it with its parent's: a model trained with one wording
and deployed with another answers differently, and nothing would say so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# A question and its answer; None where the model is to answer.
Turn = tuple[str, str | None]


class Prompt(BaseModel):
    """Text around a question and an answer, and the special tokens that end them.

    The whole text of one exchange is
    ``bos_token + [system_prefix + system + system_suffix] + user_prefix + QUESTION + user_suffix
    + model_prefix + ANSWER + end_token``; the system block is left out when `system` is empty.
    Further exchanges follow after `turn_separator`, each without a system block. A conversation may
    bring a system text of its own, which takes the place of `system`.
    Nothing else (no blank, no token of the tokenizer's own) is ever added.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    bos_token: str = Field(
        "", description="Token before everything, for models that need one; empty for none."
    )
    system: str = Field("", description="Text of the system turn; empty for none.")
    system_prefix: str = Field("", description="Text before the system text.")
    system_suffix: str = Field("", description="Text after the system text.")
    user_prefix: str = Field("Instruct: ", description="Text before the question.")
    user_suffix: str = Field("\n", description="Text after the question.")
    model_prefix: str = Field("Output:\n", description="Text before the answer.")
    turn_separator: str = Field("\n", description="Text between an ended answer and the next turn.")
    end_token: str = Field("<|endoftext|>", description="Token that ends an answer; supervised.")
    document_end_token: str = Field(
        "<|endoftext|>", description="Token between plain documents in the domain stage."
    )
    pad_token: str = Field("<|pad|>", description="Padding token; never the end token.")

    @model_validator(mode="after")
    def _pad_is_not_an_end(self) -> Prompt:
        if self.pad_token in (self.end_token, self.document_end_token, self.bos_token):
            raise ValueError(
                f"pad_token {self.pad_token!r} must differ from bos_token, end_token and "
                "document_end_token: "
                "padding is masked from the loss, so the model would never learn to stop"
            )
        return self

    @property
    def has_system_slot(self) -> bool:
        """Whether a conversation's own system text has a place: something around it, or a text
        that it replaces. Without one nothing would tell it from the question."""
        return bool(self.system_prefix or self.system_suffix or self.system)

    @property
    def system_block(self) -> str:
        """The rendered system turn of this prompt, or an empty string."""
        return self.render_system(None)

    def render_system(self, system: str | None) -> str:
        """The rendered system turn: with `system`, or with the prompt's own text for None.

        An empty string without a text, and without a place for one (`has_system_slot`).
        """
        text = system or self.system
        if not text or not self.has_system_slot:
            return ""
        return f"{self.system_prefix}{text}{self.system_suffix}"

    @property
    def stop_tokens(self) -> list[str]:
        """Tokens at which generation ends; the first is the one training supervises."""
        return list(dict.fromkeys([self.end_token, self.document_end_token]))

    def segments(self, turns: Sequence[Turn], system: str | None = None) -> list[str]:
        """The text of a conversation in pieces: what is given, an answer, what is given, ...

        Every answer is a piece of its own, with its end token, because a device tokenizes what it
        is given apart from what it wrote. A last answer of None is left open.
        """
        found = []
        before = self.begin(self.render_system(system))
        for question, answer in turns:
            found.append(
                f"{before}{self.user_prefix}{question}{self.user_suffix}{self.model_prefix}"
            )
            found += [] if answer is None else [self.render_answer(answer)]
            before = self.turn_separator
        return found

    def render_conversation(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """Text of several (question, answer) turns; a last answer of None is left open."""
        return "".join(self.segments(turns, system))

    def render_question(
        self, question: str, history: Sequence[Sequence[str]] = (), system: str | None = None
    ) -> str:
        """Text up to and including the point where the model starts to answer.

        history: (question, answer) of earlier exchanges.
        """
        earlier: list[Turn] = [(asked, answer) for asked, answer in history]
        return self.render_conversation([*earlier, (question, None)], system)

    def render_row(self, row: Mapping[str, Any]) -> str:
        """`render_question` of a prepared row, given its history and its own system text."""
        return self.render_question(row["prompt"], row.get("history", ()), row.get("system"))

    def begin(self, text: str) -> str:
        """Text that nothing stands before, as the model reads it: after the BOS."""
        return f"{self.bos_token}{text}"

    def render_document(self, text: str) -> str:
        """A plain text as stage 1 trains on it."""
        return self.begin(f"{text}{self.document_end_token}")

    def render_answer(self, answer: str) -> str:
        """Text that the model is trained to write: the answer and its end token."""
        return f"{answer}{self.end_token}"

    def chat_template(self) -> str:
        """Jinja chat template that renders `messages` exactly as `render_conversation` does.

        A first message of the system takes the place of `system`; without a place for it
        (`has_system_slot`) it is left out, as preparation leaves it out of the training data.
        Transformers passes a message's content as text, LiteRT-LM as a list of parts: both are
        read. (Most models' own templates join content with "+" and fail on the device.)
        """

        def literal(text: str) -> str:
            return "{{ " + repr(text) + " }}" if text else ""

        def content(message: str) -> str:
            return (
                f"{{% if {message}['content'] is string %}}{{{{ {message}['content'] }}}}"
                f"{{% else %}}{{% for part in {message}['content'] %}}{{{{ part['text'] }}}}"
                "{% endfor %}{% endif %}"
            )

        system = (
            "{% if messages[0]['role'] == 'system' %}"
            f"{literal(self.system_prefix)}{content('messages[0]')}{literal(self.system_suffix)}"
            f"{{% else %}}{literal(self.system_block)}{{% endif %}}"
        )
        return (
            f"{literal(self.bos_token)}{system if self.has_system_slot else ''}"
            "{% for message in messages %}"
            "{% if message['role'] == 'user' %}"
            f"{literal(self.user_prefix)}{content('message')}{literal(self.user_suffix)}"
            "{% elif message['role'] == 'assistant' %}"
            f"{literal(self.model_prefix)}{content('message')}{literal(self.end_token)}"
            f"{{% if not loop.last %}}{literal(self.turn_separator)}{{% endif %}}"
            "{% endif %}{% endfor %}"
            f"{{% if add_generation_prompt %}}{literal(self.model_prefix)}{{% endif %}}"
        )
