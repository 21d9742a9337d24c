"""chat.py: the terminal, the page and the API over scripted models, and the real ones once."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import pty
import re
import runpy
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from types import SimpleNamespace

import pytest
from conftest import ROOT

from liteguard.chat import server, terminal
from liteguard.chat.conversation import Conversation
from liteguard.chat.speakers import BundleSpeaker, Pieces, Said
from liteguard.errors import UserError
from liteguard.prompts import Prompt
from liteguard.sampling import Sampling

GREEDY = Sampling()


class Scripted:
    """A model that says what it was told to say, a word at a time; a token is a word."""

    def __init__(self, name: str, says: str, room: int = 1000, pause: float = 0.0) -> None:
        self.name, self.says, self.room, self.pause = name, says, room, pause
        self.prompt = Prompt()
        self.asked: list[tuple[str, int, Sampling]] = []
        self.stopped_at: int | None = None

    def count(self, rendered: str) -> int:
        return len(rendered.split())

    def stream(
        self, rendered: str, max_new_tokens: int, sampling: Sampling
    ) -> Generator[str, None, Said]:
        self.asked.append((rendered, max_new_tokens, sampling))
        words = re.findall(r"\s*\S+", self.says)
        for place, word in enumerate(words[:max_new_tokens]):
            self.stopped_at = place
            time.sleep(self.pause)
            yield word
        self.stopped_at = None
        text = "".join(words[:max_new_tokens])
        ended = len(words) <= max_new_tokens
        return Said(text, self.count(rendered), len(text.split()) + ended, ended, 0.5)


def answered(conversation: Conversation, question: str) -> str:
    return "".join(conversation.ask(question))


# --- a conversation -------------------------------------------------------------------------------
def test_the_whole_history_goes_through_the_one_prompt():
    speaker = Scripted("a", "It is rest.")
    conversation = Conversation(speaker, 50)
    assert answered(conversation, "What is sleep?") == "It is rest."
    answered(conversation, "And why?")
    turns = [("What is sleep?", "It is rest."), ("And why?", None)]
    assert speaker.asked[1][0] == Prompt().render_conversation(turns)
    conversation.system = "Be brief."
    conversation.reset()
    answered(conversation, "Why?")
    # Phi's prompt has no system turn: the message stands on a line of its own.
    assert speaker.asked[2][0] == "Be brief.\n" + Prompt().render_question("Why?")
    assert [e.turn for e in conversation.exchanges] == [1, 2, 3], "the transcript keeps everything"


def test_what_no_longer_fits_is_left_out_oldest_first_and_told():
    speaker = Scripted("a", "one two three", room=30)
    conversation = Conversation(speaker, 5)
    for number in range(3):
        answered(conversation, f"number {number} with some words")
    last = conversation.exchanges[-1]
    assert last.forgotten == 1
    assert "number 0" not in speaker.asked[-1][0] and "number 1" in speaker.asked[-1][0]
    assert "forgot the first 1 exchange, which" in terminal.ending(last)
    with pytest.raises(UserError, match="takes 42 tokens .* 30 hold both prompt and answer"):
        answered(conversation, "word " * 40)


def test_an_interrupted_answer_is_kept_as_far_as_it_came():
    speaker = Scripted("a", "one two three four")
    conversation = Conversation(speaker, 50)
    stream = conversation.ask("Count.")
    assert next(stream) + next(stream) == "one two"
    stream.close()
    assert speaker.stopped_at == 1, "the model was not stopped"
    exchange = conversation.exchanges[-1]
    assert (exchange.answer, exchange.ended, exchange.tokens) == ("one two", "interrupted", 2)
    answered(conversation, "Go on.")
    assert "one two<|endoftext|>" in speaker.asked[-1][0]


def test_pieces_are_the_text_without_blanks_around_it():
    texts = [" ", " It", " It is \ufffd", " It is é", " It is é ", " It is é \n"]
    pieces = Pieces()
    given = [pieces.more(text) for text in texts]
    assert given == ["", "It", " is", " é", "", ""]
    assert pieces.more(texts[-1], last=True) == ""
    assert pieces.more(" It is é \ufffd", last=True) == " \ufffd"


# --- the sampler ----------------------------------------------------------------------------------
def test_a_seed_is_shown_whole():
    assert str(Sampling.of(0.7, None, None, 1234567)) == "temperature 0.7, seed 1234567"


@pytest.mark.parametrize(
    ("says", "limit", "text"),
    [("Rest well.", 20, "Rest well."), ("Rest well.", 4, "Rest"), ("Res\ufffdt", 4, "Res")],
)
def test_a_bundles_stream_is_its_answer(says, limit, text):
    """The engine is asked for a token more than may be shown; half a character is none."""
    from liteguard.runtime.streaming import StreamedBundle

    written = says[: limit + 1]  # a token a letter, and the end token where there is room

    class Session:
        def run_prefill(self, _):
            pass

        def run_decode_async(self):
            return (SimpleNamespace(texts=[letter]) for letter in written)

        def get_benchmark_info(self):
            count = len(written) + (len(says) <= limit)
            return SimpleNamespace(last_decode_token_count=count)

        def close(self):
            pass

    class Opened(StreamedBundle):
        start_id = None

    bundle = Opened.__new__(Opened)
    bundle.tokenize, bundle.detokenize = list, "".join
    bundle._engine = SimpleNamespace(create_session=lambda **_: Session())
    stream = BundleSpeaker("bundle", bundle, Prompt(), 64).stream("ask", limit, GREEDY)
    shown = ""
    while True:
        try:
            shown += next(stream)
        except StopIteration as end:
            assert (end.value.text, shown) == (text, text)
            return


def test_the_sampler_draws_from_what_it_was_told_to():
    import torch

    logits = torch.tensor([1.0, 4.0, 2.0, 3.0])
    two = Sampling.of(top_k=2).probabilities(logits)
    assert two.nonzero()[:, 0].tolist() == [1, 3]
    assert two[1] / two[3] == pytest.approx(2.71828, rel=1e-4)
    # softmax: .64, .24, .09, .03
    assert Sampling.of(top_p=0.6).probabilities(logits).nonzero()[:, 0].tolist() == [1]
    assert Sampling.of(top_p=0.7).probabilities(logits).nonzero()[:, 0].tolist() == [1, 3]
    hot, cold = (Sampling.of(t).probabilities(logits)[1] for t in (2.0, 0.5))
    assert hot < 0.64 < cold
    assert Sampling.of(0.0, top_k=5).greedy and not Sampling.of(top_k=5).greedy
    assert str(Sampling.of(0.7, 40, None, 1)) == "temperature 0.7, top_k 40, seed 1"
    for wrong in ({"top_k": 0}, {"top_p": 1.5}, {"temperature": -1.0}, {"seed": -1}):
        with pytest.raises(UserError, match="allowed is"):
            Sampling.of(**wrong)


# --- the terminal ---------------------------------------------------------------------------------
def piped(monkeypatch, capsys, lines: str, *speakers: Scripted, **settings) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    terminal.Terminal([Conversation(s, 50) for s in speakers], **settings).run()
    return capsys.readouterr().out


def test_a_pipe_asks_a_question_a_line(monkeypatch, capsys, tmp_path):
    one = Scripted("base", "It is rest.\x1b[2J\u202e")
    two = Scripted("final", "I can't help with that.")
    file = tmp_path / "chat.jsonl"
    lines = f"What is sleep?\n\n/nothing\n/save {file}\n/save {file}\n/quit\nNever asked.\n"
    out = piped(monkeypatch, capsys, lines, one, two)
    assert "\x1b" not in out and "It is rest.\\x1b[2J\\u202e" in out, "a terminal would obey"
    assert out.index("you> What is sleep?") < out.index("\nbase\n") < out.index("\nfinal\n")
    assert "[answered, 4 tokens in 0.5 s]" in out and "[refused, 6 tokens in 0.5 s]" in out
    assert "there is no /nothing" in out and "is there already" in out
    assert len(one.asked) == 1
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(r["model"], r["verdict"]) for r in rows] == [
        ("base", "answered"),
        ("final", "refused"),
    ]
    assert rows[0]["answer"] == "It is rest.\x1b[2J\u202e", "the transcript keeps what was said"


def test_commands_of_the_conversation(monkeypatch, capsys):
    speaker = Scripted("a", "Yes.")
    lines = "One?\n/system Be brief.\nTwo?\n/reset\nThree?\n/system off\n/system\n"
    out = piped(monkeypatch, capsys, lines, speaker)
    assert [text.count("Instruct: ") for text, _, _ in speaker.asked] == [1, 2, 1]
    assert [text.startswith("Be brief.\n") for text, _, _ in speaker.asked] == [False, True, True]
    assert "a: Be brief." in out and out.rstrip().endswith("a: no system message")
    speaker = Scripted("a", "Yes.")
    piped(monkeypatch, capsys, "One?\nTwo?\n", speaker, single=True)
    assert speaker.asked[1][0] == Prompt().render_question("Two?")


CHAT = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from test_chat import Scripted, terminal, Conversation
from liteguard import cli
slow = Scripted("slow", " ".join(f"word{{n}}" for n in range(200)), pause=0.02)
cli.run(lambda: terminal.Terminal([Conversation(slow, 500)]).run())
"""


def chat_command() -> list[str]:
    return [sys.executable, "-c", CHAT.format(tests=str(ROOT / "tests"), root=str(ROOT))]


def read_until(master: int, wanted: str, seen: str = "", seconds: float = 60) -> str:
    """What a pseudo-terminal shows until `wanted` stands in it."""
    end = time.monotonic() + seconds
    while wanted not in seen:
        assert time.monotonic() < end, f"no {wanted!r} in {seen!r}"
        if select.select([master], [], [], 0.2)[0]:
            seen += os.read(master, 4096).decode(errors="replace")
    return seen


def test_ctrl_c_stops_an_answer_and_a_second_one_leaves():
    master, slave = pty.openpty()
    process = subprocess.Popen(
        chat_command(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    try:
        read_until(master, "you> ")
        os.write(master, b"Count.\n")
        read_until(master, "word3")
        process.send_signal(signal.SIGINT)
        seen = read_until(
            master, "you> ", read_until(master, "Ctrl-C again leaves").split("again")[1]
        )
        assert "word199" not in seen
        os.write(master, b"Count.\n")  # the first Ctrl-C is forgotten
        read_until(master, "word3")
        process.send_signal(signal.SIGINT)
        read_until(master, "Ctrl-C again leaves")
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(master)


def test_head_may_leave():
    process = subprocess.Popen(
        chat_command(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(b"Count.\n" * 20)
    process.stdin.close()
    assert process.stdout.readline() == b"you> Count.\n"
    process.stdout.close()
    assert process.wait(60) == 0
    assert process.stderr.read() == b""


# --- the API --------------------------------------------------------------------------------------
@pytest.fixture
def serving():
    """A server over two scripted models, one of them slow."""
    own = [
        Scripted("final", "I can't help with that."),
        Scripted("slow", "word " * 300, pause=0.02),
    ]
    with running(own) as found:
        yield found


@contextlib.contextmanager
def running(speakers: list[Scripted], **settings):
    with server.Server(speakers, 400, GREEDY, **settings) as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield found
        found.shutdown()
        found.end()


def request(found, method: str, path: str, body=None, **headers) -> tuple[int, str, dict]:
    """(status, body, headers) of one request."""
    connection = http.client.HTTPConnection("127.0.0.1", found.port, timeout=30)
    if body is not None:
        headers = {"Content-Type": "application/json", **headers}
        body = body if isinstance(body, bytes) else json.dumps(body)
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, text, dict(response.headers)


def ask_of(model: str = "final", *contents: str, **more) -> dict:
    said = contents or ("Why?",)
    roles = ["user", "assistant"] * len(said)
    messages = [{"role": r, "content": c} for r, c in zip(roles, said, strict=False)]
    return {"model": model, "messages": messages, **more}


COMPLETIONS = "/v1/chat/completions"


def test_a_completion_as_openai_writes_it(serving):
    status, text, _ = request(serving, "GET", "/v1/models")
    assert [m["id"] for m in json.loads(text)["data"]] == ["final", "slow"]
    assert json.loads(request(serving, "GET", "/v1/models/slow")[1])["object"] == "model"
    body = ask_of("final", "One?", "Yes.", "Two?", max_completion_tokens=3, temperature=0.5, seed=4)
    body["messages"].insert(0, {"role": "system", "content": [{"type": "text", "text": "Short."}]})
    status, text, _ = request(serving, "POST", COMPLETIONS, body)
    found = json.loads(text)
    assert status == 200 and found["object"] == "chat.completion" and found["model"] == "final"
    choice = found["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "I can't help", "refusal": None}
    assert choice["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] == sum(
        found["usage"][name] for name in ("prompt_tokens", "completion_tokens")
    )
    rendered, limit, sampling = serving.speakers["final"].asked[-1]
    turns = [("One?", "Yes."), ("Two?", None)]
    assert rendered == "Short.\n" + Prompt().render_conversation(turns)
    assert limit == 3 and sampling == Sampling(0.5, seed=4)
    found = json.loads(request(serving, "POST", COMPLETIONS, ask_of())[1])
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["liteguard"]["verdict"] == "refused"
    assert serving.speakers["final"].asked[-1][2].greedy


def test_a_stream_comes_in_pieces_and_ends_when_nobody_listens(serving):
    body = ask_of(stream=True, stream_options={"include_usage": True})
    status, text, headers = request(serving, "POST", COMPLETIONS, body)
    assert status == 200 and headers["Content-Type"] == "text/event-stream"
    lines = text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]" and len(lines) == 1 + 5 + 3
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    pieces = [c["delta"].get("content", "") for e in events for c in e["choices"]]
    assert "".join(pieces) == "I can't help with that."
    assert events[-2]["choices"][0]["finish_reason"] == "stop"
    assert events[-1]["usage"]["completion_tokens"] == 6 and events[-1]["choices"] == []

    connection = http.client.HTTPConnection("127.0.0.1", serving.port, timeout=30)
    content = json.dumps(ask_of("slow", stream=True))
    connection.request("POST", COMPLETIONS, content, {"Content-Type": "application/json"})
    response = connection.getresponse()
    response.readline()
    slow = serving.speakers["slow"]
    while not (slow.stopped_at or 0) > 3:
        time.sleep(0.01)
    response.close()
    connection.close()
    end = time.monotonic() + 10
    while serving.answering and time.monotonic() < end:
        time.sleep(0.02)
    assert not serving.answering and 3 < slow.stopped_at < 299


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"model": "gone"}, 404, "Models: final, slow"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "take turns"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "only text"),
        ({"messages": [{"role": "user", "content": "word " * 999}]}, 400, "1001 tokens"),
        ({"tools": [{"type": "function"}], "n": 2}, 400, "not supported here: n, tools"),
        ({"temperature": 9}, 400, "0 (greedy) to 5"),
        ({"max_tokens": 0}, 400, "max_tokens"),
    ],
)
def test_requests_that_cannot_be_answered(serving, change, status, says):
    found, text, _ = request(serving, "POST", COMPLETIONS, ask_of() | change)
    error = json.loads(text)["error"]
    assert (found, error["type"]) == (status, "invalid_request_error")
    assert says in error["message"]


def test_only_this_machines_own_pages_and_programs_are_answered(serving):
    assert serving.server_address[0] == "127.0.0.1"
    here = f"127.0.0.1:{serving.port}"
    for headers in (
        {"Host": f"evil.example:{serving.port}"},
        {"Host": "127.0.0.1"},
        {"Host": here, "Origin": "http://evil.example"},
        {"Host": here, "Origin": "null"},
    ):
        assert request(serving, "GET", "/v1/models", **headers)[0] == 403, headers
        assert request(serving, "POST", COMPLETIONS, ask_of(), **headers)[0] == 403, headers
    assert not serving.speakers["final"].asked
    own = {"Host": f"localhost:{serving.port}", "Origin": f"http://localhost:{serving.port}"}
    assert request(serving, "POST", COMPLETIONS, ask_of(), **own)[0] == 200
    # What a form on another site can send without asking first.
    plain = {"Content_Type": "text/plain"}
    assert request(serving, "POST", COMPLETIONS, json.dumps(ask_of()).encode(), **plain)[0] == 415
    assert request(serving, "POST", COMPLETIONS, b"{", Content_Length="9999999")[0] == 413
    assert request(serving, "GET", "/")[0] == 404, "the API alone has no page"


def test_a_port_that_is_taken(serving):
    with pytest.raises(UserError, match=f"port {serving.port} cannot be used"):
        server.Server([], 1, GREEDY, port=serving.port)


def test_the_openai_client(serving):
    import openai

    client = openai.OpenAI(base_url=f"{serving.url}/v1", api_key="any", max_retries=0)
    assert [m.id for m in client.models.list()] == ["final", "slow"]
    messages = [{"role": "user", "content": "Why?"}]
    found = client.chat.completions.create(model="final", messages=messages)
    assert found.choices[0].message.content == "I can't help with that."
    stream = client.chat.completions.create(model="final", messages=messages, stream=True)
    pieces = [event.choices[0].delta.content or "" for event in stream]
    assert "".join(pieces) == "I can't help with that." and len(pieces) > 4
    with pytest.raises(openai.NotFoundError, match="Models: final, slow"):
        client.chat.completions.create(model="gone", messages=messages)


# --- the page -------------------------------------------------------------------------------------
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# Asks two questions as a person would, then sends what the page shows as a third.
PROBE = """
ready.then(async () => {
  for (const question of ["What is <b>sleep</b>?", "And why?"]) {
    byId("question").value = question;
    await ask();
  }
  const content = JSON.stringify({
    answers: [...document.querySelectorAll(".answer")].map((e) => [e.className, e.textContent]),
    notes: [...document.querySelectorAll(".note")].map((e) => e.textContent),
    bold: document.querySelectorAll("b").length,
    width: document.documentElement.scrollWidth, saved: transcript.length});
  fetch("/v1/chat/completions", {method: "POST", headers: {"Content-Type": "application/json"},
    body: JSON.stringify({model: "final", messages: [{role: "user", content}]})});
});
</script>"""


def test_a_new_conversation_has_nothing_of_the_old_one():
    """Also where an answer is still running: it ends, and what it said goes with the old one."""
    page = server.PAGE.read_text()
    said = page[page.index("async function answer(") : page.index("async function ask(")]
    assert said.count("model.history") == 1 and "history.push(" in said
    reset = page[page.index('byId("reset").addEventListener') :]
    assert reset.index("running.abort()") < reset.index("model.history = []")


def test_the_page_needs_nothing_from_outside():
    page = server.PAGE.read_text()
    assert not re.findall(r"https?://|@import|url\(|<link|<iframe|src=", page)
    assert "innerHTML" not in page and page.count("NONCE") == 2


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_page_asks_all_models_and_streams(tmp_path):
    says = "<img src=x onerror=alert(1)> rest\u202e"
    speakers = [Scripted("base", says), Scripted("final", "I can't help with that.")]
    page = server.PAGE.read_text().replace("</script>", PROBE)
    with running(speakers, page=page) as found:
        headers = request(found, "GET", "/")[2]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        browser = subprocess.Popen(
            [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
            + [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=390,800"]
            + ["--remote-debugging-port=0", f"{found.url}/"],
            stderr=(tmp_path / "log").open("w"),
        )
        end = time.monotonic() + 60
        while len(speakers[1].asked) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        browser.terminate()
        browser.wait()
    log = (tmp_path / "log").read_text()
    assert len(speakers[1].asked) == 3, log[-2000:]
    seen = json.loads(speakers[1].asked[2][0].removeprefix("Instruct: ").split("\nOutput:")[0])
    wanted = ["<img src=x onerror=alert(1)> rest\\u202e", "I can't help with that."]
    assert [text for _, text in seen["answers"]] == [wanted[0], wanted[0], wanted[1], wanted[1]]
    assert [kind for kind, _ in seen["answers"]][1:3] == ["answer answered", "answer refused"]
    assert seen["notes"][0].startswith("answered, ") and seen["saved"] == 4
    assert seen["bold"] == 0, "a question became markup"
    assert seen["width"] <= 500, "wider than the window"
    turns = [("What is <b>sleep</b>?", says), ("And why?", None)]
    assert speakers[0].asked[1][0] == Prompt().render_conversation(turns)
    assert "CONSOLE" not in log, log[-2000:]


# --- the real models ------------------------------------------------------------------------------
SCRIPT = runpy.run_path(str(ROOT / "chat.py"), run_name="chat")["main"]


def test_greedy_answers_are_those_that_were_measured(pipeline, monkeypatch, capsys, tmp_path):
    """Base, stage and bundle say what evaluation/*.json has of them."""
    results = {
        name: json.loads((pipeline / f"evaluation/{name}.json").read_text())["answers"]
        for name in ("base", "final", "bundle")
    }
    # Two questions, one of them with the longest answer.
    answers = results["final"]
    longest = max(range(len(answers)), key=lambda place: len(answers[place]["answer"]))
    places = [0, longest or 1]
    lines = "".join(answers[place]["prompt"] + "\n" for place in places)
    file = tmp_path / "chat.jsonl"
    models = ["base", "final_checkpoint", "liteguard_tiny.task"]
    monkeypatch.chdir(pipeline)
    monkeypatch.setattr("sys.argv", ["chat.py", *models, "--single"])
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{lines}/save {file}\n"))
    SCRIPT()
    assert "greedy, at most 40 tokens an answer" in capsys.readouterr().out
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for name, model in zip(results, models, strict=True):
        for place, row in zip(places, [r for r in rows if r["model"] == model], strict=True):
            measured = results[name][place]
            assert row["question"] == measured["prompt"]
            assert (row["answer"], row["tokens"], row["ended"] == "stopped", row["verdict"]) == (
                measured["answer"],
                measured["tokens"],
                measured["stopped"],
                measured["verdict"],
            )


def test_what_cannot_be_talked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, says in (
        (["gone"], "There is no checkpoint directory gone"),
        (["gone.task"], "or its record gone.task.json is missing"),
        (["base"], "base of which model?"),
        (["base", "base", "--model_type", "smollm2"], "name every model once"),
        (["base", "--top_p", "2"], "top_p 2.0: allowed is above 0, at most 1"),
        (["base", "--max_new_tokens", "0"], "at least 1"),
    ):
        monkeypatch.setattr("sys.argv", ["chat.py", *words])
        with pytest.raises(UserError, match=says):
            SCRIPT()
