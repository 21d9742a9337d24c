"""A bundle as a model of the lm-evaluation-harness (`pip install lm-eval`).

    python -m liteguard.runtime.harness --bundle liteguard_phi2.litertlm --tasks medmcqa --limit 100

Numbers are comparable with the harness's own of the checkpoint (`--model hf`): the same tasks, the
same splitting of context and continuation. Tasks come from a hub.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model

from liteguard import checkpoints, cli, progress, records
from liteguard.errors import UserError
from liteguard.records import BundleRecord
from liteguard.runtime.workers import BundleWorkers

# As the harness's own models do where a task does not say.
MAX_NEW_TOKENS = 256


def fit(context: list[int], targets: list[int], room: int, begin: list[int]) -> list[int]:
    """The end of a context that leaves room for `targets` (fewer than `room`), behind the BOS.

    `begin`: the BOS, without which a model that was trained with it is another one; empty for none.
    """
    if len(context) + len(targets) <= room:
        return context
    kept = room - len(targets) - len(begin)
    return [*begin, *context[len(context) - kept :]]


@register_model("litert_lm")
class BundleLM(LM):
    """A `.task` or `.litertlm` file; everything that is generated is greedy.

    A context that its KV cache is too small for loses its beginning, as with the harness's own
    models; a prompt to be answered that is too long gets an empty answer. Where the model needs a
    BOS, it stands before every context.
    """

    def __init__(self, bundle: str, **unused: Any) -> None:
        super().__init__()
        path = Path(bundle)
        record = records.read(BundleRecord, path.with_name(f"{path.name}.json"))
        self.workers, self.room = BundleWorkers(path), record.cache_length
        self.prompt = record.prompt
        # Stands before a text that has nothing before it.
        self.start = self.workers.tokenize([record.prompt.bos_token or record.prompt.end_token])[0]

    @property
    def bos(self) -> list[int]:
        """What every context begins with; empty for a model without a BOS."""
        return self.start if self.prompt.bos_token else []

    def loglikelihood(self, requests: Sequence[Any], **unused: Any) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether it is the greedy one) of each request."""
        pairs = [self._without_trailing_blanks(*request.args) for request in requests]
        contexts = self.workers.tokenize([context for context, _ in pairs])
        # Together, as the harness's own models do: tokens may join across the border.
        wholes = self.workers.tokenize([context + continuation for context, continuation in pairs])
        return self._follow(
            [
                (context or self.start, whole[len(context) :])
                for context, whole in zip(contexts, wholes, strict=True)
            ]
        )

    def _without_trailing_blanks(self, context: str, continuation: str) -> tuple[str, str]:
        bare = context.rstrip()
        return self._begin(bare), context[len(bare) :] + continuation

    def _begin(self, text: str) -> str:
        return text if text.startswith(self.prompt.bos_token) else self.prompt.begin(text)

    def loglikelihood_rolling(self, requests: Sequence[Any], **unused: Any) -> list[float]:
        """Log-likelihood of each whole text, in pieces that the KV cache holds."""
        texts = self.workers.tokenize([request.args[0] for request in requests])
        windows, of = [], []
        for number, ids in enumerate(texts):
            found = utils.get_rolling_token_windows(
                token_list=ids,
                prefix_token=self.start[0],
                max_seq_len=self.room - 1 - len(self.bos),
                context_len=1,
            )
            for context, targets in map(utils.make_disjoint_window, found):
                # The first window begins with it already.
                begun = context[:1] == self.start
                windows.append((context if begun else self.bos + context, targets))
                of.append(number)
        totals = [0.0] * len(texts)
        for number, (likelihood, _) in zip(of, self._follow(windows), strict=True):
            totals[number] += likelihood
        return totals

    def _follow(self, pairs: Iterable[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        fitting, cut = [], 0
        for context, targets in pairs:
            if len(targets) >= self.room:
                raise UserError(
                    f"a continuation of {len(targets)} tokens does not fit the bundle's KV cache "
                    f"of {self.room}. Leave that task out, or raise compress.kv_cache_length."
                )
            kept = fit(context, targets, self.room, self.bos)
            cut += kept is not context
            fitting.append((kept, targets))
        if cut:
            print(
                f"{cut:,} of {len(fitting):,} contexts lose their beginning: with the continuation "
                f"they are longer than the KV cache of {self.room:,} tokens"
            )
        found: list[tuple[float, bool]] = [(0.0, False)] * len(fitting)
        bar = progress.Progress("continuations", len(fitting))
        for index, result in self.workers.follow(fitting):
            found[index] = result
            bar.add(len(fitting[index][1]))
        bar.close()
        return found

    def generate_until(self, requests: Sequence[Any], **unused: Any) -> list[str]:
        """The answer to each request, up to the first of its `until` texts."""
        prompts, limits, ends = [], [], []
        for request in requests:
            prompt, settings = request.args
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise UserError("answers of a bundle are greedy here: take do_sample out")
            until = settings.get("until") or []
            ends.append([until] if isinstance(until, str) else list(until))
            limits.append(int(settings.get("max_gen_toks", MAX_NEW_TOKENS)))
            prompts.append(self._begin(prompt))
        found = [""] * len(prompts)
        bar = progress.Progress("answers", len(prompts))
        for index, answer in self.workers.generate(prompts, limits, self.room):
            text = answer.text
            for end in filter(None, ends[index]):
                text = text.split(end)[0]
            found[index] = text
            bar.add(answer.tokens)
        bar.close()
        return found


def main() -> None:
    import lm_eval

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bundle", metavar="FILE", required=True, help="a .task or .litertlm file")
    parser.add_argument("--tasks", metavar="NAME", nargs="+", required=True, help="the harness's")
    parser.add_argument("--limit", metavar="N", type=int, help="questions of each task")
    parser.add_argument("--num_fewshot", metavar="N", type=int)
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    model = BundleLM(args.bundle)
    found = lm_eval.simple_evaluate(
        model=model,
        tasks=args.tasks,
        limit=args.limit,
        num_fewshot=args.num_fewshot,
    )
    print(utils.make_table(found))
    if args.json:
        checkpoints.write_json(Path(args.json), found["results"])


if __name__ == "__main__":
    cli.run(main)
