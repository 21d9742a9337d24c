"""What is in the prepared data: rows in, dropped by reason, out; tokens, lengths, what is cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from liteguard import checkpoints, models, writing
from liteguard.rows import FIELDS

if TYPE_CHECKING:
    from liteguard.config import Config

BATCH = 1_000
# Upper ends of the bars on the screen, in tokens; lengths.png has finer ones.
BARS = (32, 64, 128, 256, 512, 1024, 2048)


def table(manifest: dict[str, Any]) -> str:
    """Rows of every source in and out with the reasons, then the rows of every file."""
    lines = [f"{'':12} {'source':22}{'read':>10}{'dropped':>10}{'kept':>10}"]
    for entry in manifest["sources"]:
        dropped = sum(entry["dropped"].values())
        lines.append(
            f"{entry['part']:12} {entry['dataset']:22}{entry['rows_read']:10,}{dropped:10,}"
            f"{entry['rows_kept']:10,}"
        )
        reasons = sorted(entry["dropped"].items(), key=lambda item: (-item[1], item[0]))
        lines += [f"{'':35}{count:10,} {reason}" for reason, count in reasons]
        if entry["rows_added"]:
            lines.append(f"{'':35}{entry['rows_added']:10,} more: pieces of texts that were cut")
    lines += ["", f"{'file':32}{'rows':>10}{'entities':>10}{'words':>13}"]
    for name, entry in manifest["counts"].items():
        lines.append(f"{name:32}{entry['rows']:10,}{entry['entities']:10,}{entry['words']:13,}")
        if "conversations" in entry:
            lines.append(f"{'':4}{entry['conversations']:,} conversations of several turns")
        if "tiers" in entry:
            wording = entry["tiers"]["held-out wording"]
            lines.append(
                f"{'':4}{entry['tiers']['unseen']:,} about entities nowhere in training, "
                f"{entry['tiers']['seen']:,} about ones that rows of training are about"
                + (f", {wording:,} held out by their wording only" if wording else "")
            )
    against = ", ".join(manifest["decontaminated_against"])
    lines += ["", f"kept apart (13 words in common, the same question or nearly so): {against}"]
    return "\n".join(lines)


def closing(manifest: dict[str, Any]) -> str:
    """How many rows there are to train on, of each stage, and how many are held out."""
    rows = {name: entry["rows"] for name, entry in manifest["counts"].items()}
    trained = {part: rows[f"{part}/train.jsonl"] for part in FIELDS}
    of_each = ", ".join(f"{count:,} {part}" for part, count in trained.items())
    test = sum(rows[f"{part}/test.jsonl"] for part in FIELDS)
    return f"{sum(trained.values()):,} training rows ({of_each}), {test:,} held out for testing"


def write(config: Config, data_dir: Path) -> str:
    """Count tokens of the training rows; write report.json and lengths.png beside the data."""
    tokenizer = models.load_base_tokenizer(config)
    limits = {
        part: min(getattr(config, stage).max_length, config.model.context_length)
        for part, stage in (
            ("domain", "domain"),
            ("instruction", "instruction"),
            ("preference", "safety"),
        )
    }
    lengths = {part: token_lengths(config, tokenizer, data_dir, part) for part in FIELDS}
    report: dict[str, Any] = {}
    lines = ["", f"{'training rows':14}{'tokens':>14}{'median':>9}{'95 %':>9}{'longest':>9}  cut"]
    for part, counts in lengths.items():
        # A long domain text is cut into overlapping pieces: nothing of it is lost.
        cut = 0.0 if part == "domain" else float((counts > limits[part]).mean())
        percentiles = np.percentile(counts, [50, 95, 100])
        report[part] = {
            "rows": len(counts),
            "tokens": int(counts.sum()),
            "median": percentiles[0],
            "percentile_95": percentiles[1],
            "longest": percentiles[2],
            "max_length": limits[part],
            "share_cut": cut,
        }
        text = "packed" if part == "domain" else f"{cut:.2%} longer than {limits[part]}"
        lines.append(
            f"{part:14}{counts.sum():14,}{percentiles[0]:9,.0f}{percentiles[1]:9,.0f}"
            f"{percentiles[2]:9,.0f}  {text}"
        )
    lines += ["", f"{'tokens up to':14}" + "".join(f"{bar:8,}" for bar in BARS) + "    more"]
    for part, counts in lengths.items():
        bars = np.bincount(np.searchsorted(BARS, counts), minlength=len(BARS) + 1)
        report[part]["histogram"] = dict(zip([*map(str, BARS), "more"], bars.tolist(), strict=True))
        lines.append(f"{part:14}" + "".join(f"{share:8.1%}" for share in bars / len(counts)))
    report["preference"]["answers"] = answers = answer_lengths(data_dir)
    lines += [
        "",
        f"{'answers, words':14}{'pairs':>10}{'chosen':>9}{'rejected':>10}{'correlation':>13}",
        *(
            f"{kind:14}{found['pairs']:10,}{found['chosen']:9.1f}{found['rejected']:10.1f}"
            f"{found['correlation']:13.3f}"
            for kind, found in answers.items()
        ),
        "correlation of length with being chosen: 0 = length teaches nothing",
    ]
    draw(lengths, limits, data_dir / "lengths.png")
    checkpoints.write_json(data_dir / "report.json", report)
    lines.append(f"wrote {data_dir / 'report.json'} and {data_dir / 'lengths.png'}")
    return "\n".join(lines)


def token_lengths(config: Config, tokenizer: Any, data_dir: Path, part: str) -> np.ndarray:
    """Tokens of every training row as the stage will see it, shape (rows,).

    A preference row counts with the longer of its two answers.
    """
    prompt = config.prompt
    counts: list[int] = []
    texts: list[tuple[str, ...]] = []
    openings: list[int | None] = []

    def flush() -> None:
        flat = [text for row in texts for text in row]
        ids = tokenizer(flat, add_special_tokens=False)["input_ids"]
        sizes = iter(map(len, ids))
        for row, opening in zip(texts, openings, strict=True):
            own = [next(sizes) for _ in row]
            answer = max(own[1:], default=0)
            counts.append(own[0] + min(answer, opening or answer))
        texts.clear()
        openings.clear()

    with (data_dir / part / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            openings.append(row.get("opening_tokens"))
            if part == "domain":
                texts.append((prompt.render_document(row["text"]),))
            else:
                answers = [row[field] for field in FIELDS[part][1:]]
                texts.append((prompt.render_row(row), *map(prompt.render_answer, answers)))
            if len(texts) == BATCH:
                flush()
    flush()
    return np.array(counts, np.int64)


def answer_lengths(data_dir: Path) -> dict[str, dict[str, float]]:
    """For all training pairs and each kind: mean words of the chosen and of the rejected answers.

    `correlation` is the point-biserial correlation of an answer's length with being chosen.
    """
    words: dict[str, list[tuple[int, int]]] = {"all": []}
    with (data_dir / "preference" / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            pair = len(row["chosen"].split()), len(row["rejected"].split())
            words["all"].append(pair)
            words.setdefault(row.get("kind") or "unknown", []).append(pair)
    found = {}
    for kind, pairs in words.items():
        chosen, rejected = np.array(pairs).T
        spread = np.concatenate([chosen, rejected]).std()
        difference = chosen.mean() - rejected.mean()
        found[kind] = {
            "pairs": len(pairs),
            "chosen": float(chosen.mean()),
            "rejected": float(rejected.mean()),
            # Both groups are of one size, so sqrt(p q) in the usual formula is 1/2.
            "correlation": float(difference / (2 * spread)) if spread else 0.0,
        }
    return found


def draw(lengths: dict[str, np.ndarray], limits: dict[str, int], path: Path) -> None:
    """Histograms of tokens per row with the length at which a stage cuts, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(lengths), figsize=(4.2 * len(lengths), 3.2))
    for axis, (part, counts) in zip(axes, lengths.items(), strict=True):
        top = int(np.percentile(counts, 99.5) * 1.05) + 1
        # Whole numbers of tokens in every bar, else bars alternate between two and one; what is
        # longer is in the last bar.
        width = max(1, round((top - int(counts.min())) / 50))
        edges = np.arange(int(counts.min()), top + 2 * width, width)
        axis.hist(np.minimum(counts, edges[-1] - 1), bins=edges, color="#35618f")
        if part != "domain" and limits[part] <= top:
            axis.axvline(limits[part], color="#b03a2e", label=f"max_length {limits[part]}")
            axis.legend()
        axis.set(title=f"{part} ({len(counts):,} rows)", xlabel="tokens", ylabel="rows")
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with writing.replacing(path) as beside:
        figure.savefig(beside, dpi=110, format="png")
    pyplot.close(figure)
