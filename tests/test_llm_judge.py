"""The optional LLM judge against a local service that speaks /chat/completions."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from liteguard.config import build, validate
from liteguard.data import sets
from liteguard.errors import UserError, WorkError
from liteguard.evaluation import (
    comparison,
    held_out,
    llm_judge,
    metrics,
    refusals,
    rubrics,
    run,
    summary,
)
from liteguard.evaluation.journal import Journal
from liteguard.records import LlmJudge

KEY = "sk-not-to-be-written"


class Service(BaseHTTPRequestHandler):
    """Replies by words of the answer; keeps what it was asked."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        question = body["messages"][1]["content"]
        status = 200
        if self.server.failures:
            status = self.server.failures.pop()
        reply = "Refused." if "sorry" in question else "answered"
        if "odd" in question:
            reply = "It could be refused or answered."
        if criterion := question.partition("<criterion>")[2]:
            reply = "Yes." if "met" in criterion else "hardly" if "odd" in criterion else "no"
        content = {"choices": [{"message": {"content": reply}}], "usage": {"completion_tokens": 2}}
        odd = "garbage" in question or not self.path.startswith("/v1/")
        payload = b"no JSON" if odd else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_):
        pass


@pytest.fixture
def service(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.asked, server.failures = [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setattr(llm_judge.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def settings(server, **other):
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    section = {"url": url, "model": "judge-1", "api_key_env": "JUDGE_KEY", **other}
    return build([("test", {"evaluate": {"llm_judge": section}})])


ANSWERS = ["I'm sorry, I can't help with that.", "Drink water and rest.", "It is odd to ask that."]
ANSWERS += ["That is garbage to me, I think.", "I am sorry, but rest is what you need now."]


def rows_and_journal(path):
    rows = {name: [] for name in (*held_out.TIERS, *held_out.REQUESTS)}
    rows["questions"] = [{"prompt": "Not judged?"}]
    rows["harmful"] = [{"prompt": f"Harm {n}", "area": "fraud"} for n in range(3)]
    rows["ordinary"] = [{"prompt": f"Help {n}"} for n in range(2)]
    journal = Journal(path, {"a": 1})
    for index, text in enumerate(["An answer.", *ANSWERS]):
        value = {"text": text, "tokens": 5, "stopped": True, "seconds": 0.1}
        journal.add("answers", index, value)
    return rows, journal


def test_answers_to_requests_are_judged_once_and_kept(service, tmp_path, capsys):
    config = settings(service)
    path = tmp_path / "final.partial.jsonl"
    rows, journal = rows_and_journal(path)
    service.failures = [503, 429]
    run.ask_judge(config, rows, journal)
    verdicts = {index: reply["verdict"] for index, reply in journal.found["judged"].items()}
    expected = ["refused", "answered", "unparsed", "unparsed", "refused"]
    assert verdicts == dict(enumerate(expected, 1)), "the first is no request"
    assert len(service.asked) == 5 + 2, "a service that is busy is asked again"
    for where, key, body in service.asked:
        assert (where, key) == ("/v1/chat/completions", f"Bearer {KEY}")
        assert body["model"] == "judge-1" and body["temperature"] == 0
    questions = [body["messages"][1]["content"] for *_, body in service.asked]
    assert any("Harm 0" in q and ANSWERS[0] in q for q in questions)
    # A second run finds them in the journal.
    again = Journal(path, {"a": 1})
    run.ask_judge(config, rows, again)
    assert again.found["judged"] == journal.found["judged"] and len(service.asked) == 7
    assert again.seconds["judged"] > 0
    written = path.read_text() + capsys.readouterr().out + str(config.model_dump())
    assert KEY not in written and "JUDGE_KEY" in written


def test_outside_requests_are_judged_too_and_outside_questions_are_not(service, tmp_path):
    """Other languages are met in outside sets, where the rules cannot read the answers."""
    rows, journal = rows_and_journal(tmp_path / "final.partial.jsonl")
    outside = {"preguntas": "questions", "daño": "harmful", "normal": "borderline"}
    for place, (name, kind) in enumerate(outside.items(), 6):
        rows[name] = [{"prompt": f"Outside {name}", "measured_as": kind}]
        value = {"text": "I am sorry.", "tokens": 5, "stopped": True, "seconds": 0.1}
        journal.add("answers", place, value)
    run.ask_judge(settings(service), rows, journal)
    asked = " ".join(body["messages"][1]["content"] for *_, body in service.asked)
    assert "Outside daño" in asked and "Outside normal" in asked
    assert "Outside preguntas" not in asked
    assert {*journal.found["judged"]} == {1, 2, 3, 4, 5, 7, 8}
    answers = [{"set": "daño", "verdict": "answered", "llm_verdict": "refused"}]
    own = llm_judge.summarise(answers)
    assert LlmJudge.model_validate(own).verdicts == {"daño": {"refused": 1}}
    (note,) = comparison._judge_notes({"final": {"llm_judge": own}})
    assert note.endswith("Refused/answered/unclear by it: daño 1 / 0 / 0.")


def test_verdicts_stand_beside_the_rules_with_their_agreement():
    answers = [
        {
            "set": "harmful" if n < 3 else "ordinary",
            "verdict": refusals.judge(text),
            "llm_verdict": verdict,
        }
        for n, (text, verdict) in enumerate(
            zip(ANSWERS, ["refused", "answered", "unparsed", "unclear", "refused"], strict=True)
        )
    ]
    answers.append({"set": "questions", "verdict": "answered"})
    assert [a["verdict"] for a in answers[:5]] == ["refused"] + ["answered"] * 4
    found = llm_judge.summarise(answers)
    assert (found["n"], found["unparsed"], found["agreement"]) == (5, 1, 0.5)
    # Rules: 1 refused, 3 answered; LLM: 2 refused, 1 answered, 1 unclear. Chance (2 + 3) / 16.
    assert found["kappa"] == pytest.approx((0.5 - 5 / 16) / (1 - 5 / 16))
    assert found["verdicts"]["harmful"] == {"refused": 1, "answered": 1, "unparsed": 1}
    assert found["pairs"]["answered/refused"] == 1


def test_rubrics_are_judged_one_by_one_and_scored_as_healthbench_scores(service, tmp_path):
    def criteria(*found: tuple[str, float]) -> list[dict]:
        return [{"criterion": text, "points": points, "tags": []} for text, points in found]

    asked = [{"role": "user", "content": f"I have a cough {n}."} for n in range(3)]
    healthbench = [
        {"prompt": asked[:1], "rubrics": criteria(("is met", 5), ("missed", 3), ("met", -2))},
        {"prompt": asked[1:2], "rubrics": criteria(("odd", 4))},
        {"prompt": asked[2:], "rubrics": [{"criterion": "", "points": 5}]},
    ]
    file = tmp_path / "hb.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in healthbench))
    own = {"name": "hb", "path": str(file), "kind": "rubrics"}
    with pytest.raises(UserError, match="1 of 3 rows cannot be used") as failed:
        sets.outside(validate({"evaluate": {"sets": [own]}}, "test"))
    assert "no list of {criterion, points}" in str(failed.value)
    file.write_text("".join(json.dumps(row) + "\n" for row in healthbench[:2]))
    config = settings(service)
    with pytest.raises(UserError, match="hb has rubrics") as failed:
        rubrics.require_judge(validate({"evaluate": {"sets": [own]}}, "test"))
    assert "evaluate.llm_judge={url" in str(failed.value)

    rows, _ = rows_and_journal(tmp_path / "unused.jsonl")
    rows["questions"] = [{"prompt": "Not judged?", "completion": "No."}]
    rows |= sets.outside(validate({"evaluate": {"sets": [own]}}, "test"))
    path = tmp_path / "final.partial.jsonl"
    journal = Journal(path, {"a": 1})
    for index in range(8):
        value = {"text": "Drink water.", "tokens": 5, "stopped": True, "seconds": 0.1}
        journal.add("answers", index, value)
    rubrics.ask(config, rows, journal)
    assert len(service.asked) == 4
    body = service.asked[0][2]
    assert body["messages"][0]["content"] == rubrics.TASK.instruction
    assert "<answer>\nDrink water.\n</answer>" in body["messages"][1]["content"]
    rubrics.ask(config, rows, Journal(path, {"a": 1}))
    assert len(service.asked) == 4, "what was judged is in the journal"

    answers = [a for a in summary.given_answers(rows, journal) if a["set"] == "hb"]
    scores = {a["prompt"]: (a["rubric"], a["unjudged"]) for a in answers}
    assert scores == {"I have a cough 0.": (3 / 8, 0), "I have a cough 1.": (0.0, 1)}
    found = summary.set_numbers("rubrics", "hb.jsonl", answers, [])
    assert found["rubric"] == 3 / 16 and found["n"]["rubric"] == 2
    assert found["intervals"]["rubric"] == (0, 3 / 8)
    result = {"sets": {"hb": found}, "answers": answers}
    row = comparison.set_rows({"final": result})[0]
    assert (row["title"], row["cells"]["final"]) == ("hb: rubric score", ("19 %", "0-38"))
    assert "1 criteria without a verdict" in comparison._set_notes({"final": result})[0]


def test_a_rubric_score_is_cut_only_as_a_mean():
    found = rubrics.numbers([{"rubric": -2.5}, {"rubric": 1.0}])["rubric"]
    assert found[:2] == (0.0, 2) and found[2] == (0, 1)
    assert rubrics.numbers([{"rubric": -0.5}, {"rubric": 1.0}])["rubric"][0] == 0.25


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("refused", "refused"),
        ("**Answered**", "answered"),
        ("Unclear: it is cut off.", "unclear"),
        ("refused, not answered", "unparsed"),
        ("unrefused", "unparsed"),
        ("", "unparsed"),
    ],
)
def test_replies(text, verdict):
    assert llm_judge.parse(text) == verdict


def test_kappa_of_literal_counts():
    # Textbook table: 20 both yes, 15 both no, 5 and 10 otherwise: 0.7 agree, 0.5 by chance.
    pairs = [("y", "y")] * 20 + [("n", "n")] * 15 + [("y", "n")] * 5 + [("n", "y")] * 10
    assert metrics.cohen_kappa(pairs) == pytest.approx(0.4)
    assert metrics.cohen_kappa([("y", "y")] * 3) is None and metrics.cohen_kappa([]) is None


@pytest.mark.parametrize(
    ("failures", "other", "said"),
    [
        ([404], {}, "answered with status 404"),
        ([400], {}, "declined a question"),
        ([503, 503], {}, "gave no answer \\(status 503\\)"),
        ([], {"path": "/v2"}, "does not answer as /chat/completions does: no JSON"),
        ([], {"url": "http://127.0.0.1:1/v1"}, "gave no answer \\(ConnectionError\\)"),
    ],
)
def test_a_judge_that_will_not_answer_is_found_before_the_work(service, failures, other, said):
    if path := other.pop("path", None):
        other = {"url": f"http://127.0.0.1:{service.server_address[1]}{path}"}
    service.failures = [503]
    llm_judge.Judge(settings(service).evaluate.llm_judge).check()  # busy once
    service.failures = failures
    with pytest.raises(UserError, match=said) as error:
        llm_judge.Judge(settings(service, **other).evaluate.llm_judge).check()
    assert KEY not in str(error.value)


def test_mistakes_and_failures_are_told_apart(service, monkeypatch):
    config = settings(service)
    service.failures = [401]
    judge = llm_judge.Judge(config.evaluate.llm_judge)
    with pytest.raises(UserError, match="status 401") as mistake:
        list(judge.ask([("a", "b")]))
    service.failures = [500] * 9
    with pytest.raises(WorkError, match="run the same command again") as failure:
        list(judge.ask([("a", "b")]))
    assert KEY not in str(mistake.value) + str(failure.value)
    # A content filter declines single texts; a wrong parameter is declined for all of them.
    service.failures = [400]
    replies = dict(judge.ask([("a", "b"), ("a", "c"), ("a", "d")]))
    assert sorted(r.verdict for r in replies.values()) == ["answered", "answered", "unparsed"]
    service.failures = [400]
    assert [r.verdict for _, r in judge.ask([("a", "b")], accepted=True)] == ["unparsed"]
    service.failures = [400, 400]
    with pytest.raises(UserError, match="declined every question.*choices"):
        list(judge.ask([("a", "b"), ("a", "c")]))
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="environment variable JUDGE_KEY"):
        llm_judge.Judge(config.evaluate.llm_judge)
    llm_judge.Judge(settings(service, api_key_env=None).evaluate.llm_judge)
