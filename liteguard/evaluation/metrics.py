"""Pure scoring functions; the arithmetic is in rouge-score, sacrebleu and scipy."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from liteguard.evaluation.refusals import judge as judge
from liteguard.text import is_latin, is_unspaced, text_key


def perplexity(sum_log_likelihood: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood per token (natural log)."""
    if tokens < 1:
        raise ValueError("perplexity needs at least one token")
    return math.exp(-sum_log_likelihood / tokens)


def bits_per_byte(sum_log_likelihood: float, utf8_bytes: int) -> float:
    """Bits that the model spends on a byte of text: comparable across tokenizers."""
    if utf8_bytes < 1:
        raise ValueError("bits per byte need at least one byte")
    return -sum_log_likelihood / math.log(2) / utf8_bytes


# A to z and digits, as rouge-score has them, with the letters of other languages.
_LATIN_WORD = re.compile("[a-z0-9\u00df-\u00f6\u00f8-\u024f\u1e00-\u1eff]+")


def rouge(predictions: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L of each row (rouge-score).

    English words are stemmed. rouge-score's own tokenizer knows a to z and digits only, so words
    with other Latin letters are compared as they are, and texts in other scripts by the words of
    `text_key`.
    """
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    english = DefaultTokenizer(use_stemmer=True)

    class AnyScript:
        def tokenize(self, text: str) -> list[str]:
            if text.isascii():
                return english.tokenize(text)
            if not is_latin(text):
                return text_key(text).split()
            # A dot above is what is left of the Turkish capital I.
            plain = unicodedata.normalize("NFC", text).lower().replace("\u0307", "")
            stems: list[str] = []
            for word in _LATIN_WORD.findall(plain):
                stems += english.tokenize(word) if word.isascii() else [word]
            return stems

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, tokenizer=AnyScript())
    scores = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    return {kind: [s[kind].fmeasure for s in scores] for kind in kinds}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """(corpus BLEU between 0 and 100, sacrebleu's signature)."""
    scorer = _bleu_of(references)
    score = scorer.corpus_score(list(predictions), [list(references)]).score
    return score, str(scorer.get_signature())


def bleu_signature(references: Sequence[str]) -> str:
    """sacrebleu's signature of the scores that `bleu` gives for these references."""
    scorer = _bleu_of(references)
    scorer.corpus_score(["a"], [["a"]])
    return str(scorer.get_signature())


def _bleu_of(references: Sequence[str]) -> Any:
    """sacrebleu's BLEU with the tokenizer for the script of most references: a character is a word
    where words are not told apart by blanks."""
    from sacrebleu.metrics import BLEU

    unspaced = [text for text in references if is_unspaced(text)]
    if 2 * len(unspaced) <= len(references):
        return BLEU()
    chinese = sum("\u4e00" <= letter <= "\u9fff" for text in unspaced for letter in text)
    return BLEU(tokenize="zh" if 2 * chinese > sum(map(len, unspaced)) else "char")


Interval = tuple[float, float]


def wilson(successes: int, trials: int) -> Interval | None:
    """95 % interval of a rate (Wilson 1927, by scipy); None without trials.

    At 0 of 40 it is 0 to 9 %, where the usual normal approximation has no width.
    """
    from scipy.stats import binomtest

    if not trials:
        return None
    found = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


RESAMPLES = 1000


def bootstrap(statistic: Callable[..., Any], *columns: Sequence[float]) -> Interval | None:
    """95 % percentile interval of a statistic over rows drawn anew 1000 times (Efron 1979, scipy).

    Args:
        statistic: called with the drawn columns, arrays of shape (..., rows), and `axis`.
        columns: one value per row each; rows are drawn whole.

    Returns None for fewer than two rows. The seed is fixed: the same rows, the same interval.
    """
    import numpy as np
    from scipy.stats import bootstrap as resample

    if len(columns[0]) < 2:
        return None
    found = resample(
        [np.asarray(column, float) for column in columns],
        statistic,
        n_resamples=RESAMPLES,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Bootstrap interval of a mean."""
    return bootstrap(lambda x, axis: x.mean(axis), values)


def ratio_interval(
    sums: Sequence[float], counts: Sequence[float], transform: Callable[[Any], Any]
) -> Interval | None:
    """Bootstrap interval of transform(sum of `sums` / sum of `counts`), e.g. a perplexity."""
    return bootstrap(lambda s, n, axis: transform(s.sum(axis) / n.sum(axis)), sums, counts)


def bleu_interval(predictions: Sequence[str], references: Sequence[str]) -> Interval | None:
    """Bootstrap interval of corpus BLEU; rows are counted once by sacrebleu and added up."""
    import numpy as np
    from sacrebleu.metrics import BLEU

    scorer = _bleu_of(references)
    rows = [scorer.corpus_score([p], [[r]]) for p, r in zip(predictions, references, strict=True)]
    counts = np.array([[*r.counts, *r.totals, r.sys_len, r.ref_len] for r in rows])

    def score(drawn: Any, axis: int) -> Any:
        # As `corpus_score` calls it.
        totals = counts[drawn.astype(int)].sum(-2).reshape(-1, 10).tolist()
        scores = [
            BLEU.compute_bleu(t[:4], t[4:8], t[8], t[9], smooth_method="exp").score for t in totals
        ]
        return np.array(scores).reshape(drawn.shape[:-1])

    return bootstrap(score, range(len(rows)))


def word_count(text: str) -> int:
    """Words of a text; its characters, where words are not told apart by blanks."""
    return len(text_key(text).split() if is_unspaced(text) else text.split())


# The marks of other scripts end a sentence without a blank after them.
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+|(?<=[\u3002\uff01\uff1f\u0964\u061f\u06d4])\s*")


def repeats_itself(answer: str, times: int = 3) -> bool:
    """Whether the same sentence (of at least three words, or characters where words are not told
    apart by blanks) stands in an answer `times` times.

    A last sentence that the length limit cut counts when it begins like the one repeated: what
    loops until it is cut has repeated itself.
    """
    sentences = [_words_of(sentence) for sentence in _SENTENCE_END.split(answer)]
    counts = Counter(s for s in sentences if s.count(" ") >= 2)
    if not counts:
        return False
    repeated, most = counts.most_common(1)[0]
    last = sentences[-1]
    cut = last != repeated and last.count(" ") >= 2 and repeated.startswith(last)
    return most + cut >= times


def _words_of(sentence: str) -> str:
    if is_unspaced(sentence):
        return text_key(sentence)
    return " ".join(re.findall(r"\w+", sentence.lower()))


# Words that every answer about a disease may have, whatever it says: they add nothing to a name.
_SAYING_NOTHING = """
    a an the this that these those it its they them their he she his her him you your we our i
    is are was were be been being am do does did done have has had having can could may might will
    would shall should must of in on at by for from to into with within as about and or but also if
    then than so such when where which who whom whose what why how there here other another any some
    each every all both s one kind type form sort variety variant subtype example case class group
    category name term word called known named termed defined definition described describes refers
    refer referred means mean meaning relates related relating associated involves characterized
    characterised caused causes cause causing results result occurs occur occurring happens happen
    affects affect affecting seen found makes make people person persons patient patients individual
    individuals someone anyone human disease diseases disorder disorders condition conditions
    syndrome syndromes illness illnesses problem problems thing things medical health certain
    various very
"""
_SHORTEST_STEM = 5


def is_circle(question: str, answer: str) -> bool:
    """Whether an answer says nothing beyond the question's own words ("X is a form of X").

    Words that would fit any answer (a form of, a disease that affects people) add nothing; yes, no,
    not and numbers do. Inflected forms are the same word: stems are equal (Porter, by rouge-score)
    or begin with one another, from five letters on. False of an answer without words. Questions
    that are not plainly English also have a rule that knows no language: `_names_twice`.
    """
    stems, empty = _stemmer()
    asked, given = set(stems(question)), set(stems(answer))
    if given and all(any(_same_word(stem, other) for other in asked) for stem in given - empty):
        return True
    return _ENGLISH.isdisjoint(text_key(question).split()) and _names_twice(question, answer)


# No other language that is written in Latin letters has these words.
_ENGLISH = {"what", "which", "how", "why", "when", "where", "does", "are", "the"}
_MOST_OTHERS = 3


def _names_twice(question: str, answer: str) -> bool:
    """Whether an answer says a word of the question at least twice, and hardly anything else.

    A word has four letters or more (in a script without blanks: two Chinese characters, or four
    others in a row); three other words (or characters) are what "is a form of" takes.
    """
    asked, given = text_key(question).split(), text_key(answer).split()
    others = [word for word in given if word not in asked]
    twice = {name for name, count in Counter(_names(given)).items() if count >= 2}
    return len(others) <= _MOST_OTHERS and not twice.isdisjoint(_names(asked))


def _names(words: list[str]) -> list[str]:
    """What may be the name of something among the words of a `text_key`."""
    found = [word for word in words if len(word) >= 4]
    for size in (2, 4):
        for run in zip(*(words[start:] for start in range(size)), strict=False):
            name = "".join(run)
            # From here on, a character is a syllable with a meaning, not a letter.
            if is_unspaced(name) and (size == 4 or min(name) >= "\u3400"):
                found.append(name)
    return found


@functools.cache
def _stemmer() -> tuple[Callable[[str], list[str]], set[str]]:
    """(text -> stems of its words, stems of the words that say nothing)."""
    from rouge_score.tokenizers import DefaultTokenizer

    stems = DefaultTokenizer(use_stemmer=True).tokenize
    return stems, {stem for word in _SAYING_NOTHING.split() for stem in stems(word)}


def _same_word(stem: str, other: str) -> bool:
    short, long = sorted((stem, other), key=len)
    return stem == other or (len(short) >= _SHORTEST_STEM and long.startswith(short))


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Agreement of two judges beyond chance: (p_o - p_e) / (1 - p_e) (Cohen 1960).

    p_o is the share of pairs that agree, p_e what judges with these frequencies would reach by
    chance. None where that is 1 (both always say the same) or without pairs.
    """
    if not pairs:
        return None
    count = len(pairs)
    ours, theirs = (Counter(column) for column in zip(*pairs, strict=True))
    by_chance = sum(ours[label] * theirs[label] for label in ours) / count**2
    agreed = sum(a == b for a, b in pairs) / count
    return (agreed - by_chance) / (1 - by_chance) if by_chance < 1 else None
