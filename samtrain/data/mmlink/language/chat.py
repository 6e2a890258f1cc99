"""A client of OpenAI-compatible chat completions that a long build can rely on.

Every usable response is kept on disk by its request, so nothing is asked (or paid for) twice, kill -9 included. Calls
share one rate limit and one budget. What is worth another try (429, 5xx, time-outs, broken connections, responses that
are no completion) is tried again after a growing pause, or after what `Retry-After` says; a budget that is used up
stops the build; what is wrong with the request or the key stops it at once.
"""

import email.utils
import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from samtrain.core.errors import ConfigError, SamtrainError
from samtrain.core.files import atomic_write_json
from samtrain.data.mmlink.optional import import_optional
from samtrain.data.mmlink.options import ChatWriterOptions
from samtrain.data.mmlink.records import Failed

MAX_RESPONSE_BYTES = 4_000_000
MAX_RETRY_AFTER_SECONDS = 600.0
_SPENT = "spent.jsonl"
_BYTES_PER_TOKEN = 3.0  # for the estimate that is reserved before the true usage is known
_RETRIED = (408, 409, 425, 429)

Messages = list[dict[str, str]]


class BudgetExhausted(SamtrainError):
    """The next call might exceed the budget; what was done is kept."""


class RequestRefused(SamtrainError):
    """The endpoint says that the request, the model or the key is wrong; trying again would not help."""


class ChatClient:
    """Thread-safe.

    Args:
        folder: of responses and of what was spent; counts go on over restarts.
        sleep, clock: for tests.

    Raises:
        ConfigError: the environment variable of the key is not set, or the HTTP client is not installed.
    """

    def __init__(
        self,
        options: ChatWriterOptions,
        *,
        folder: Path,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.options = options
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)
        key = os.environ.get(options.api_key_env, "")
        if not key:
            raise ConfigError(
                f"writer.api_key_env = {options.api_key_env!r}: this environment variable is not set; it holds the key "
                "(any text for a server that asks for none)"
            )
        self._http = import_optional("httpx2", needed_for="writer.kind = openai")
        self._client = self._http.Client(
            headers={"Authorization": f"Bearer {key}"}, timeout=options.timeout_seconds, follow_redirects=False
        )
        self._sleep = sleep
        self._pace = _Pace(options, sleep=sleep, clock=clock)
        self._budget = _Budget(options, folder / _SPENT)
        self._lock = threading.Lock()
        self._counts = {"calls": 0, "cached": 0, "requests": 0, "retries": 0}

    def complete(self, messages: Messages, *, check: Callable[[str], Any]) -> Any:
        """`check(text)` of the response; a response that `check` refuses with ValueError is asked for again.

        Raises:
            Failed: not in `max_attempts` tries. BudgetExhausted, RequestRefused: the build must stop.
        """
        request = {
            "model": self.options.model,
            "messages": messages,
            "temperature": self.options.temperature,
            "max_tokens": self.options.max_tokens,
        }
        self._count("calls")
        path = self._path(request)
        kept = _kept(path)
        if kept is not None:
            try:
                checked = check(kept)
                self._count("cached")
                return checked
            except ValueError:  # what is asked of a response has changed since
                path.unlink(missing_ok=True)
        problem = ""
        for attempt in range(self.options.max_attempts):
            if attempt:
                self._count("retries")
            text, problem, wait = self._attempt(request)
            if text is not None:
                try:
                    checked = check(text)
                except ValueError as error:
                    problem, wait = f"the response is not what was asked for ({error})", 0.0
                else:
                    atomic_write_json(path, {"request": request, "response": text})
                    return checked
            if attempt + 1 < self.options.max_attempts:
                self._sleep(self._backoff(attempt) if wait is None else wait)
        raise Failed(f"no usable response in {self.options.max_attempts} attempts; the last: {problem}")

    def usage(self) -> dict[str, Any]:
        """Calls of this client, and what was spent in all, earlier runs included."""
        with self._lock:
            return {**self._counts, "spent": self._budget.spent()}

    def close(self) -> None:
        self._client.close()

    def _attempt(self, request: dict[str, Any]) -> tuple[str | None, str, float | None]:
        """One request: (text, what was wrong, how long to wait; None = as the backoff says)."""
        prompt_bytes = sum(len(message["content"].encode()) for message in request["messages"])
        estimate = round(prompt_bytes / _BYTES_PER_TOKEN) + 8, self.options.max_tokens
        self._budget.reserve(*estimate)
        usage: tuple[int, int] | None = None
        try:
            self._pace.wait(sum(estimate))
            self._count("requests")
            status, headers, body = self._post(request)
            if status == 200:
                text, usage = _completion(body)
                return text, "", None
            said = body[:300].decode("utf-8", "replace").strip()
            problem = f"HTTP {status}: {said}"
            if status in _RETRIED or status >= 500:
                # A request that was turned away was not answered: it costs no tokens.
                usage = (0, 0)
                wait = retry_after(headers.get("retry-after"))
                if status == 429 and wait is not None:
                    self._pace.pause(wait)
                return None, problem, wait
            usage = (0, 0)
            raise RequestRefused(f"{self.options.base_url}: {problem}; check writer.base_url, writer.model and the key")
        except self._http.TimeoutException:
            return None, f"no answer in {self.options.timeout_seconds} s", None
        except self._http.HTTPError as error:
            usage = (0, 0) if isinstance(error, self._http.ConnectError) else None
            return None, f"{type(error).__name__}: {error}", None
        except ValueError as error:
            return None, f"no chat completion: {error}", None
        finally:
            self._budget.settle(*estimate, usage)

    def _post(self, request: dict[str, Any]) -> tuple[int, Any, bytes]:
        url = f"{self.options.base_url.rstrip('/')}/chat/completions"
        with self._client.stream("POST", url, json=request) as response:
            pieces, size = [], 0
            for piece in response.iter_bytes():
                size += len(piece)
                if size > MAX_RESPONSE_BYTES:
                    raise ValueError(f"more than {MAX_RESPONSE_BYTES} bytes")
                pieces.append(piece)
            return response.status_code, response.headers, b"".join(pieces)

    def _backoff(self, attempt: int) -> float:
        """Doubling, at most the maximum, with jitter so that callers do not come back all at once."""
        longest = min(self.options.max_backoff_seconds, self.options.backoff_seconds * 2**attempt)
        return longest * random.uniform(0.5, 1.0)  # of no effect on results

    def _path(self, request: dict[str, Any]) -> Path:
        text = json.dumps([self.options.base_url, request], sort_keys=True, ensure_ascii=False)
        name = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.json"

    def _count(self, what: str) -> None:
        with self._lock:
            self._counts[what] += 1


class _Pace:
    """When the next request may go: spaced by the limits per minute, and not before a pause is over."""

    def __init__(
        self, options: ChatWriterOptions, *, sleep: Callable[[float], None], clock: Callable[[], float]
    ) -> None:
        self._options, self._sleep, self._clock = options, sleep, clock
        self._lock = threading.Lock()
        self._next = self._pause_until = 0.0

    def wait(self, tokens: int) -> None:
        """Take the next free moment, and wait for it."""
        spacing = 0.0
        if self._options.requests_per_minute:
            spacing = 60 / self._options.requests_per_minute
        if self._options.tokens_per_minute:
            spacing = max(spacing, 60 * tokens / self._options.tokens_per_minute)
        with self._lock:
            now = self._clock()
            start = max(now, self._next, self._pause_until)
            self._next = start + spacing
        if start > now:
            self._sleep(start - now)

    def pause(self, seconds: float) -> None:
        """Nobody asks before that: the endpoint said when it wants to be asked again."""
        with self._lock:
            self._pause_until = max(self._pause_until, self._clock() + seconds)


class _Budget:
    """What was spent, on disk, and what calls under way may still spend."""

    def __init__(self, options: ChatWriterOptions, path: Path) -> None:
        self._options, self._path = options, path
        self._lock = threading.Lock()
        self._requests = self._input = self._output = 0
        self._reserved = [0, 0, 0]  # requests, input tokens, output tokens
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a line cut off by kill -9, or no line yet
            with open(path, "a") as stream:
                stream.write("\n")
        for row in _rows(path):
            self._requests += 1
            self._input += row[0]
            self._output += row[1]

    def reserve(self, input_tokens: int, output_tokens: int) -> None:
        """Raises BudgetExhausted where the call, with those under way, might exceed a limit."""
        options = self._options
        with self._lock:
            requests = self._requests + self._reserved[0] + 1
            inputs = self._input + self._reserved[1] + input_tokens
            outputs = self._output + self._reserved[2] + output_tokens
            limits = (
                ("budget_requests", options.budget_requests, requests),
                ("budget_tokens", options.budget_tokens, inputs + outputs),
                ("budget_cost", options.budget_cost, self._cost(inputs, outputs)),
            )
            for name, limit, wanted in limits:
                if limit is not None and wanted > limit:
                    raise BudgetExhausted(
                        f"writer.{name} = {limit} is used up after {self._requests} requests, {self._input} input and "
                        f"{self._output} output tokens (the next call might make it {wanted}); what was done is kept: "
                        "raise it and build again to go on"
                    )
            for i, amount in enumerate((1, input_tokens, output_tokens)):
                self._reserved[i] += amount

    def settle(self, input_tokens: int, output_tokens: int, usage: tuple[int, int] | None) -> None:
        """A call is over. usage: None where it may have been answered and nobody knows: the estimate counts."""
        used = usage if usage is not None else (input_tokens, output_tokens)
        with self._lock:
            for i, amount in enumerate((1, input_tokens, output_tokens)):
                self._reserved[i] -= amount
            self._requests += 1
            self._input += used[0]
            self._output += used[1]
            with open(self._path, "a") as stream:
                stream.write(f"{json.dumps(used)}\n")

    def spent(self) -> dict[str, Any]:
        with self._lock:
            cost = round(self._cost(self._input, self._output), 6)
            return {
                "requests": self._requests,
                "input_tokens": self._input,
                "output_tokens": self._output,
                "cost": cost,
            }

    def _cost(self, inputs: int, outputs: int) -> float:
        prices = self._options.price_per_million_input_tokens, self._options.price_per_million_output_tokens
        return (inputs * prices[0] + outputs * prices[1]) / 1e6


def retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for (a number, or a date), within reason."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS) if seconds == seconds else None


def _completion(body: bytes) -> tuple[str, tuple[int, int] | None]:
    """Text and usage. Raises ValueError where it is no chat completion."""
    try:
        values = json.loads(body)  # a JSONDecodeError is a ValueError
    except RecursionError:
        raise ValueError("brackets nested too deeply") from None
    try:
        text = values["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise ValueError("no choices[0].message.content") from None
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the message is empty")
    usage = values.get("usage")
    try:
        # Never negative: what an endpoint says must not give a budget back.
        return text, (max(0, int(usage["prompt_tokens"])), max(0, int(usage["completion_tokens"])))
    except (KeyError, TypeError, ValueError, OverflowError):
        return text, None


def _kept(path: Path) -> str | None:
    try:
        text = json.loads(path.read_bytes())["response"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _rows(path: Path) -> list[list[int]]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append([int(row[0]), int(row[1])])
        except (ValueError, TypeError, IndexError, KeyError):
            continue  # a line cut off by kill -9
    return rows
