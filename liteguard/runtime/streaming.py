"""A bundle that gives its answer piece by piece, greedy or with the engine's own sampler."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator

from liteguard.runtime.bundle import Answer, Bundle
from liteguard.sampling import GREEDY, Sampling


class StreamedBundle(Bundle):
    """`Bundle` with `stream` beside `generate`. One answer at a time."""

    def stream(
        self,
        rendered: str,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
    ) -> Generator[str, None, Answer]:
        """The answer to a fully rendered prompt in pieces; returns all of it.

        Closing the generator stops the engine. Raises WorkError when the prompt does not fit the
        KV cache.
        """
        started = time.perf_counter()
        session = self._engine.create_session(
            apply_prompt_template=False,
            sampler_config=self._sampler(sampling),
            max_output_tokens=max_new_tokens + 1,  # see `generate`
        )
        pieces: list[str] = []
        ended = False
        try:
            session.run_prefill([self._without_start(rendered)])
            for response in session.run_decode_async():
                pieces.append(response.texts[0])
                # One behind: the last one may be the token too many.
                if len(pieces) > 1:
                    yield pieces[-2]
            ended = True
            written = session.get_benchmark_info().last_decode_token_count
        except RuntimeError as error:
            raise self._failed(rendered, error) from error
        finally:
            if not ended:
                with contextlib.suppress(RuntimeError):
                    session.cancel_process()
            session.close()
        text, stopped = "".join(pieces), False
        if written <= max_new_tokens:
            stopped = len(self.tokenize(text)) < written
        else:
            text = self.detokenize(self.tokenize(text)[:max_new_tokens])
            written = max_new_tokens
        if not stopped:
            text = text.rstrip("\ufffd")  # half a character, as in `generate`
        return Answer(text, written, stopped, time.perf_counter() - started)
