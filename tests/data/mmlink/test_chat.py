"""The language model's client against a real HTTP server that speaks the protocol, failures included."""

import email.utils
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from samtrain.core.errors import ConfigError
from samtrain.data.mmlink.language import Facts, Scene, Text
from samtrain.data.mmlink.language.chat import BudgetExhausted, ChatClient, RequestRefused, retry_after
from samtrain.data.mmlink.language.writer import ChatWriter, parse_text
from samtrain.data.mmlink.options import ChatWriterOptions
from samtrain.data.mmlink.records import Failed

ASK = [{"role": "user", "content": "say something"}]


class Sleeper:
    """Keeps what would have been waited for; nobody waits."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.now = 0.0
        self.lock = threading.Lock()

    def sleep(self, seconds: float) -> None:
        with self.lock:
            self.waits.append(seconds)
            self.now += seconds

    def clock(self) -> float:
        return self.now


def client(chat: Any, folder: Path, *, sleeper: Sleeper | None = None, **options: Any) -> ChatClient:
    given = {"base_url": chat.base_url, "model": "tiny", "api_key_env": "MMLINK_TEST_KEY", **options}
    sleeper = sleeper or Sleeper()
    return ChatClient(ChatWriterOptions(**given), folder=folder, sleep=sleeper.sleep, clock=sleeper.clock)


def ask(chat_client: ChatClient, text: str = "say something") -> str:
    answer: str = chat_client.complete([{"role": "user", "content": text}], check=str)
    return answer


def test_a_request_has_the_protocol_s_form(chat: Any, tmp_path: Path) -> None:
    assert ask(client(chat, tmp_path, temperature=0.2, max_tokens=33)) == "a quiet place"
    assert chat.requests == [{"model": "tiny", "messages": ASK, "temperature": 0.2, "max_tokens": 33}]
    headers = {name.lower(): value for name, value in chat.headers[0].items()}
    assert headers["path"] == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret-key" and headers["content-type"] == "application/json"


def test_a_second_client_finds_the_response_without_a_call(chat: Any, tmp_path: Path) -> None:
    ask(client(chat, tmp_path))
    other = client(chat, tmp_path, budget_requests=1, concurrency=3, timeout_seconds=9.0)
    assert ask(other) == "a quiet place"
    assert len(chat.requests) == 1
    assert other.usage()["cached"] == 1 and other.usage()["requests"] == 0
    ask(client(chat, tmp_path, temperature=0.1))
    assert len(chat.requests) == 2  # another request, another response


def test_429_waits_as_long_as_retry_after_says(chat: Any, tmp_path: Path) -> None:
    sleeper = Sleeper()
    chat.script = [chat.returns(429, "slow down", Retry_After="7"), chat.returns(429, Retry_After="3")]
    assert ask(client(chat, tmp_path, sleeper=sleeper)) == "a quiet place"
    assert len(chat.requests) == 3
    assert sleeper.now == pytest.approx(10)


def test_a_pause_holds_for_all_callers(chat: Any, tmp_path: Path) -> None:
    sleeper = Sleeper()
    chat.script = [chat.returns(429, Retry_After="60")]
    with pytest.raises(Failed):
        ask(client_ := client(chat, tmp_path, sleeper=sleeper, max_attempts=1), "first")
    assert sleeper.now == 0  # its last attempt: nothing to wait for
    ask(client_, "second")
    assert sleeper.now == pytest.approx(60)


def test_retry_after_takes_seconds_and_dates_within_reason() -> None:
    assert retry_after("2.5") == 2.5 and retry_after(None) is None and retry_after("soon") is None
    assert retry_after("1e9") == 600 and retry_after("-4") == 0 and retry_after("nan") is None
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 25 < (retry_after(date) or 0) <= 31


def test_500s_are_tried_again_with_growing_pauses(chat: Any, tmp_path: Path) -> None:
    sleeper = Sleeper()
    chat.script = [chat.returns(500), chat.returns(503), chat.returns(502), chat.returns(500)]
    options = {"backoff_seconds": 1.0, "max_backoff_seconds": 5.0, "max_attempts": 5}
    assert ask(client(chat, tmp_path, sleeper=sleeper, **options)) == "a quiet place"
    for wait, longest in zip(sleeper.waits, (1, 2, 4, 5), strict=True):
        assert longest / 2 <= wait <= longest


def test_attempts_end_and_the_last_problem_is_told(chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.returns(500, "out of order")
    with pytest.raises(Failed, match=r"no usable response in 3 attempts; the last: HTTP 500: out of order"):
        ask(client(chat, tmp_path, max_attempts=3))
    assert len(chat.requests) == 3


def test_a_slow_answer_times_out_and_is_asked_for_again(chat: Any, tmp_path: Path) -> None:
    def slow(request: dict[str, Any]) -> Any:
        time.sleep(1.5)
        return chat.says("too late")(request)

    chat.script = [slow]
    assert ask(client(chat, tmp_path, timeout_seconds=0.3)) == "a quiet place"
    assert len(chat.requests) == 2


def test_a_server_that_is_gone_is_a_failure_not_a_crash(chat: Any, tmp_path: Path) -> None:
    gone = client(chat, tmp_path, max_attempts=2)
    chat.server.shutdown()
    chat.server.server_close()
    with pytest.raises(Failed, match="ConnectError"):
        ask(gone)


@pytest.mark.parametrize(
    "body",
    [
        "{not json",
        "[]",
        '{"choices": []}',
        '{"choices": [{"message": {}}]}',
        '{"choices": [{"message": {"content": ""}}]}',
        "[" * 100_000,
    ],
)
def test_malformed_responses_are_asked_for_again_and_never_kept(body: str, chat: Any, tmp_path: Path) -> None:
    chat.script = [chat.returns(200, body)]
    assert ask(client(chat, tmp_path)) == "a quiet place"
    assert len(chat.requests) == 2
    assert [json.loads(path.read_text())["response"] for path in tmp_path.glob("*/*.json")] == ["a quiet place"]


def test_an_endless_response_is_cut(chat: Any, tmp_path: Path) -> None:
    chat.script = [chat.returns(200, "x" * 5_000_000)]
    assert ask(client(chat, tmp_path)) == "a quiet place"


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_wrong_request_or_key_stops_at_once_without_showing_the_key(status: int, chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.returns(status, "no such model")
    with pytest.raises(RequestRefused, match=rf"HTTP {status}: no such model; check writer") as caught:
        ask(client(chat, tmp_path))
    assert len(chat.requests) == 1 and "secret-key" not in str(caught.value)


def test_redirects_are_not_followed(chat: Any, tmp_path: Path) -> None:
    """The key must not travel to wherever a server points."""
    chat.otherwise = chat.returns(302, "", Location="http://127.0.0.1:9/elsewhere")
    with pytest.raises(RequestRefused, match="HTTP 302"):
        ask(client(chat, tmp_path))


def test_a_budget_of_requests_holds_over_threads_and_restarts(chat: Any, tmp_path: Path) -> None:
    first = client(chat, tmp_path, budget_requests=5)

    def one(number: int) -> str:
        try:
            return ask(first, f"question {number}")
        except BudgetExhausted as error:
            return f"stopped: {error}"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(12)))
    assert len(chat.requests) == 5
    assert sum(answer.startswith("stopped: writer.budget_requests = 5 is used up") for answer in answers) == 7
    with pytest.raises(BudgetExhausted, match="raise it and build again"):
        ask(client(chat, tmp_path, budget_requests=5), "another")
    done = answers.index("a quiet place")
    assert ask(client(chat, tmp_path, budget_requests=5), f"question {done}") == "a quiet place"
    assert ask(client(chat, tmp_path, budget_requests=6), "another") == "a quiet place"


def test_a_budget_of_tokens_counts_what_the_server_says(chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.says("yes", usage=(100, 50))
    spending = client(chat, tmp_path, budget_tokens=1000, max_tokens=100)
    with pytest.raises(BudgetExhausted, match=r"budget_tokens = 1000"):
        for number in range(100):
            ask(spending, f"question {number}")
    spent = spending.usage()["spent"]
    assert spent["input_tokens"] + spent["output_tokens"] == 150 * len(chat.requests)
    assert 800 < 150 * len(chat.requests) <= 1000


def test_a_budget_of_money_uses_the_prices(chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.says("yes", usage=(1000, 1000))
    prices = {"price_per_million_input_tokens": 1.0, "price_per_million_output_tokens": 3.0}
    spending = client(chat, tmp_path, budget_cost=0.02, max_tokens=1000, **prices)
    with pytest.raises(BudgetExhausted, match=r"budget_cost = 0\.02"):
        for number in range(100):
            ask(spending, f"question {number}")
    assert spending.usage()["spent"]["cost"] == pytest.approx(0.004 * len(chat.requests))
    assert len(chat.requests) == 5


def test_where_the_server_counts_nothing_the_estimate_does(chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.says("yes", usage=None)
    spending = client(chat, tmp_path, max_tokens=50)
    ask(spending)
    assert spending.usage()["spent"]["output_tokens"] == 50
    chat.script = [chat.returns(500)]
    ask(spending, "again")
    assert spending.usage()["spent"]["output_tokens"] == 100  # what was turned away costs no tokens


def test_a_line_of_the_ledger_cut_off_by_a_kill_is_survived(chat: Any, tmp_path: Path) -> None:
    ask(client(chat, tmp_path))
    with open(tmp_path / "spent.jsonl", "a") as stream:
        stream.write("[20, ")
    later = client(chat, tmp_path)
    assert later.usage()["spent"]["requests"] == 1
    ask(later, "again")
    assert client(chat, tmp_path).usage()["spent"]["requests"] == 2  # the new line is not glued to the torn one


@pytest.mark.parametrize("tokens", [-1000, float("inf")])
def test_an_endpoint_cannot_give_a_budget_back(tokens: float, chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.says("yes", usage=(tokens, tokens))
    spending = client(chat, tmp_path)
    ask(spending)
    spent = spending.usage()["spent"]
    assert spent["requests"] == 1 and spent["input_tokens"] >= 0 and spent["output_tokens"] >= 0


def test_requests_keep_the_pace_of_the_limits(chat: Any, tmp_path: Path) -> None:
    sleeper = Sleeper()
    paced = client(chat, tmp_path, sleeper=sleeper, requests_per_minute=30.0)
    for number in range(4):
        ask(paced, f"question {number}")
    assert sleeper.now == pytest.approx(6)  # the first at once, then one every two seconds
    sleeper = Sleeper()
    paced = client(chat, tmp_path / "tokens", sleeper=sleeper, tokens_per_minute=6000.0, max_tokens=88)
    for number in range(3):
        ask(paced, f"question {number}")
    assert sleeper.now == pytest.approx(2 * 60 * 100 / 6000, rel=0.1)


def test_a_key_that_is_not_set_is_named(chat: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'NO_SUCH_VARIABLE': this environment variable is not set"):
        client(chat, tmp_path, api_key_env="NO_SUCH_VARIABLE")


def facts(**changes: Any) -> Facts:
    values: dict[str, Any] = {
        "domain": "objects",
        "num_images": 2,
        "name": "a red fox",
        "plural": False,
        "captions": ("a fox asleep", "a red fox"),
        "neighbours": (("a bus",), ("an owl",)),
        "places": ("at the top left", "in the middle"),
        "titles": (),
        "common": {},
        "seed": 5,
    }
    return Facts(**values | changes)


def writer(chat: Any, folder: Path) -> ChatWriter:
    options = ChatWriterOptions(
        base_url=chat.base_url, model="tiny", api_key_env="MMLINK_TEST_KEY", backoff_seconds=0.01
    )
    return ChatWriter(options, folder=folder)


def test_the_writer_tells_all_it_knows_and_takes_json_even_in_a_fence(chat: Any, tmp_path: Path) -> None:
    reply = '```json\n{"instruction": "What is\\nshared?", "answer": "A red fox."}\n```'
    chat.otherwise = chat.says(reply)
    assert writer(chat, tmp_path).write(facts()) == Text("What is shared?", "A red fox.")
    asked = chat.requests[0]["messages"][-1]["content"]
    for known in ("a red fox", "a fox asleep", "a bus", "an owl", "at the top left", "in the middle"):
        assert known in asked


def test_a_reply_of_another_form_is_asked_for_again(chat: Any, tmp_path: Path) -> None:
    good = chat.says('{"instruction": "q?", "answer": "a fox"}')
    chat.script = [chat.says("Sure! Here it is."), chat.says('{"instruction": "q?"}'), good]
    assert writer(chat, tmp_path).write(facts()).answer == "a fox"
    assert len(chat.requests) == 3


@pytest.mark.parametrize(
    "reply", ["no json", "{", '{"instruction": 3, "answer": "x"}', '{"instruction": "x", "answer": " "}']
)
def test_replies_that_are_no_text_are_refused(reply: str) -> None:
    with pytest.raises(ValueError):
        parse_text(reply)


def test_a_background_is_free_or_one_of_the_photographs(chat: Any, tmp_path: Path) -> None:
    chat.otherwise = chat.says('"A misty forest path."')
    asked = writer(chat, tmp_path)
    assert asked.describe(Scene(("a fox",), (), 1)) == "A misty forest path"
    scenes = ("grey rocks", "a path through a forest", "a lake")
    assert asked.describe(Scene(("a fox",), scenes, 1)) == "a path through a forest"
    assert all(scene in chat.requests[-1]["messages"][-1]["content"] for scene in scenes)
