"""How the next token is chosen: greedy, as every measurement does it, or drawn at random."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liteguard.errors import UserError

if TYPE_CHECKING:
    import torch

# A bundle's engine wants a number of candidates; this many hold nearly all of the probability.
MOST_CANDIDATES = 1000


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler. `temperature` 0 is greedy: the likeliest token, whatever the rest.

    Of the `top_k` likeliest tokens those are kept that together reach `top_p` of the probability,
    and one of them is drawn. The same `seed` gives the same answer again.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "temperature": (0 <= self.temperature <= 5, "0 (greedy) to 5"),
            "top_k": (self.top_k is None or self.top_k >= 1, "1 or more"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0, at most 1"),
            "seed": (self.seed is None or 0 <= self.seed < 2**31, "0 to 2147483647"),
        }
        for name, (met, limits) in allowed.items():
            if not met:
                raise UserError(f"{name} {getattr(self, name)}: allowed is {limits}")

    @classmethod
    def of(
        cls,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Sampling:
        """From flags or a request, None where something was not given: nothing given is greedy."""
        if temperature is None:
            temperature = 0.0 if top_k is None and top_p is None else 1.0
        return cls(temperature, top_k, top_p, seed)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def __str__(self) -> str:
        if self.greedy:
            return "greedy"
        given = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        shown = [f"{name} {value:g}" for name, value in given.items() if value is not None]
        # Whole: with six digits of it nothing could be drawn again.
        return ", ".join([*shown, *([] if self.seed is None else [f"seed {self.seed}"])])

    def for_engine(self) -> dict[str, Any]:
        """What LiteRT-LM's SamplerConfig is made with; greedy is the likeliest of one."""
        if self.greedy:
            return {"top_k": 1}
        return {
            "top_k": self.top_k or MOST_CANDIDATES,
            "top_p": self.top_p or 1.0,
            "temperature": self.temperature,
            "seed": self.drawn_seed(),
        }

    def drawn_seed(self) -> int:
        """The seed of one answer: the one that was set, or a new one."""
        return random.randrange(2**31) if self.seed is None else self.seed

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What each token of a vocabulary (a vector) is drawn with; not for greedy."""

        most = min(self.top_k or len(logits), len(logits))
        values, order = (logits.float() / self.temperature).topk(most)
        chances = values.softmax(-1)
        if self.top_p is not None:
            # The first always stays: what is before it adds up to nothing.
            chances = chances * (chances.cumsum(-1) - chances < self.top_p)
            chances = chances / chances.sum()
        return chances.new_zeros(len(logits)).scatter(0, order, chances)

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """The next token of a vocabulary's logits (a vector); `generator` is on the CPU."""
        import torch

        if self.greedy:
            return int(logits.argmax())
        return int(torch.multinomial(self.probabilities(logits).cpu(), 1, generator=generator))


GREEDY = Sampling()
