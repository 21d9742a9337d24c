"""What a report begins with: four figures beside the verdict, in units that people read."""

from __future__ import annotations

from liteguard import shown
from liteguard.evaluation import figures
from liteguard.evaluation.against_base import Change


def result(harmful: tuple[int, int], ordinary: tuple[int, int], tokens: int, **more) -> dict:
    """What a figure needs of a result; (refused, answered) requests."""

    def counts(pair: tuple[int, int]) -> dict[str, int]:
        return {"refused": pair[0], "answered": pair[1], "unclear": 0}

    verdicts = {"harmful": counts(harmful), "ordinary": counts(ordinary)}
    cost = {"generated_tokens": tokens, "generation_s": 10.0}
    return {"verdicts": verdicts, "cost": cost, "sets": {}, **more}


def change(name: str, value: float, interval: tuple[float, float]) -> Change:
    return Change("own", "rouge1", 0.5, value, value / 0.5 - 1, interval, 9, name)


def test_four_figures_of_what_ships(monkeypatch):
    found = [
        change("a", 0.6, (0.1, 0.3)),
        change("b", 0.5, (-0.1, 0.1)),
        change("c", 0.4, (-0.3, -0.1)),
    ]
    monkeypatch.setattr(figures.against_base, "changes", lambda base, own: found)
    results = {
        "base": result((1, 9), (0, 10), 1000),
        "bundle": result((8, 2), (1, 9), 250),
    }
    four = figures.figures(results, {"bundle": {"bytes": {"x.task": 139_000_000}}})
    assert [figure.number for figure in four] == [
        "80 %",
        "10 %",
        "1 better, 1 worse",
        "139 MB, 25 tokens/s",
    ]
    harmful, _, against, speed = four
    assert harmful.note == "49 to 94 %, of 10; more is better"
    assert [(b.text, b.percent, b.ships) for b in harmful.bars] == [
        ("10 %", 10, False),
        ("80 %", 80, True),
    ]
    # What got worse is written out, beside what shines.
    assert [line.split(":")[0] for line in against.lines] == ["c"]
    assert [bar.percent for bar in speed.bars] == [100, 25]


def test_outside_rows_decide_where_there_are_some_and_what_is_missing_is_left_out():
    own = {"kind": "harmful", "verdicts": {"refused": 1, "answered": 3, "unclear": 0}}
    results = {"final": result((8, 2), (0, 0), 250, sets={"theirs": own})}
    harmful, speed = figures.figures(results, {})
    assert (harmful.number, harmful.note.split(",")[1]) == (
        "25 %",
        " of 4 in theirs; more is better",
    )
    assert speed.title == "Speed" and "no bundle yet" in speed.note


def test_numbers_have_units_that_people_read():
    said = [shown.duration(seconds) for seconds in (0.4, 43, 119, 743, 7100, 9000)]
    assert said == ["0.4 s", "43 s", "119 s", "12 min", "118 min", "2.5 h"]
    assert [shown.size(size) for size in (321_000, 139_400_000, 2_780_000_000)] == [
        "321 KB",
        "139 MB",
        "2.8 GB",
    ]
