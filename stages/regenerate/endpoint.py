"""Request replies from a server with the OpenAI API: concurrent requests with retries.

Errors are of three kinds. Transient (no or a cut connection, 408, 409, 425, 429, 5xx, a malformed answer): retried with
exponential backoff and jitter; a Retry-After pauses all requests. Of the prompt (other 4xx): that row is given up and
listed. Of the run (the key is refused, there is no such model): UsageError.
"""

import asyncio
import contextlib
import email.utils
import os
import random
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from urllib.parse import urlsplit, urlunsplit

from pipeline.corpus.rejections import Unusable
from pipeline.errors import UsageError, first_line
from stages.regenerate.prompts import Failure, Job, Options, Renderer
from stages.regenerate.replies import Malformed, Reply, read_answer

RETRIED_STATUS = {408, 409, 425, 429}  # and every 5xx
FATAL_STATUS = {401, 403, 404, 405}
MAX_BACKOFF_S = 60.0  # between retries, without a Retry-After
MAX_RETRY_AFTER_S = 3600.0
# Sent to engines that would else take these from the model's generation_config.json: a greedy reply with a repetition
# penalty is not greedy, and a draft is verified without one.
NEUTRAL_SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


class Endpoint:
    """A server and its model to use. UsageError when the server cannot be reached or has no such model."""

    def __init__(self, options: Options):
        self.options, self.url = options, _base_url(options.endpoint)
        self.shown_url, self._key = _without_secrets(self.url), os.environ.get(options.api_key_env) or "none"
        self.openai, self.pace = _openai(), _RateLimiter(options.rate)
        self.unanswered = 0  # rows given up since the last reply
        self.model, self.engine = asyncio.run(self._find_model())

    def ask(self, jobs: Iterator[Job], renderer: Renderer | None, on_reply: Callable, on_failure: Callable) -> None:
        """Request all replies turn by turn; call `on_reply(job, reply)`, or `on_failure(failure)` once a job."""
        self.renderer, self.on_reply, self.on_failure = renderer, on_reply, on_failure
        asyncio.run(self._ask_all(jobs))

    async def _find_model(self) -> tuple[str, str]:
        """Return the model's name on the server, and which engine that is."""
        async with self.client() as client:
            try:
                listed = [model async for model in client.models.list()]
            except Exception as error:
                if self.options.served_model and getattr(error, "status_code", None) in (404, 405):
                    return self.options.served_model, self.options.engine or "openai"  # a server without that list
                cause = self.without_key(first_line(f"{type(error).__name__}: {error}"))
                raise UsageError(
                    f"{self.shown_url} does not list its models ({cause}); check --endpoint, the server and the key in "
                    f"{self.options.api_key_env}"
                ) from error
        named = {model.id: model for model in listed}
        wanted = self.options.served_model or (next(iter(named)) if len(named) == 1 else None)
        if wanted not in named:
            asked = f"no model {wanted!r}" if wanted else "several models"
            raise UsageError(
                f"{self.shown_url} has {asked}; pass --served-model with one of {', '.join(sorted(named))}"
            )
        owner = str(getattr(named[wanted], "owned_by", ""))
        return wanted, self.options.engine or (owner if owner in ("vllm", "sglang") else "openai")

    def without_key(self, text: str) -> str:
        """Return a server's message fit to print: without the API key, which some quote, or control characters."""
        text = text if self._key == "none" else text.replace(self._key, "***")
        return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)

    @contextlib.asynccontextmanager
    async def client(self):
        """Yield a client of the server that does not retry by itself: `_answer` does, and counts."""
        direct = {"http_client": self.openai.DefaultAsyncHttpxClient(trust_env=False)} if _is_local(self.url) else {}
        async with self.openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key, max_retries=0, timeout=self.options.timeout, **direct
        ) as client:
            yield client

    def request(self, job: Job) -> dict:
        """Return the arguments of one chat completion."""
        options, more = self.options, {}
        if self.engine in ("vllm", "sglang"):
            more = {"return_token_ids": True, **NEUTRAL_SAMPLING}
        if kwargs := {**options.template_kwargs, **(job.row.template_kwargs or {})}:
            more["chat_template_kwargs"] = kwargs
        drawn = {"seed": job.seed(options.seed) % 2**31} if options.temperature else {}
        return {
            "model": self.model,
            "messages": job.messages(),
            "temperature": options.temperature,
            "top_p": options.top_p,
            "max_tokens": options.max_new,
            **({"tools": job.row.tools} if job.row.tools else {}),
            **drawn,
            "extra_body": more,
        }

    async def _ask_all(self, jobs: Iterator[Job]) -> None:
        async with self.client() as client:
            tasks = [asyncio.create_task(self._work(client, jobs)) for _ in range(self.options.concurrency)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, client, jobs: Iterator[Job]) -> None:
        for job in jobs:  # one iterator for all workers
            while not job.done:
                outcome = await self._answer(client, job)
                if isinstance(outcome, Failure):
                    self.on_failure(outcome)
                    break
                self.on_reply(job, outcome)

    async def _answer(self, client, job: Job) -> Reply | Failure:
        """Return the reply to a job's next prompt, retried as far as the options allow, or the failure."""
        request, cause = self.request(job), ""
        for attempt in range(self.options.retries + 1):
            await self.pace.wait()
            try:
                raw = await client.chat.completions.with_raw_response.create(**request)
                reply = read_answer(raw.http_response.content)
            except Malformed as error:
                cause = str(error)
            except self.openai.APIStatusError as error:
                cause = self._status(error)
                if not (error.status_code in RETRIED_STATUS or error.status_code >= 500):
                    return Failure(job.row, job.turn, cause)
                self.pace.pause(_retry_after(error.response.headers))
            except self.openai.APIConnectionError as error:
                cause = f"{type(error).__name__}: {error.__cause__ or error}"
            else:
                self.unanswered = 0
                self._check_prompt(job, reply)
                return reply
            backoff_s = min(self.options.backoff_s * 2**attempt, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
        return self._give_up(job, f"{self.options.retries + 1} times: {self.without_key(cause)}")

    def _status(self, error) -> str:
        """Return the text of a status error; UsageError where it would meet every prompt."""
        text = self.without_key(first_line(f"{error.status_code}: {error.message}", 200))
        if error.status_code in FATAL_STATUS:
            raise UsageError(
                f"{self.shown_url} refuses every request ({text}); check the key in "
                f"{self.options.api_key_env}, --endpoint and --served-model"
            ) from error
        return text

    def _give_up(self, job: Job, cause: str) -> Failure:
        """Return the failure; UsageError when so many in a row failed that the server must be down."""
        self.unanswered += 1
        if self.unanswered > max(8, self.options.concurrency):
            raise UsageError(
                f"{self.shown_url} has not answered {self.unanswered} prompts in a row, the last one {cause}; "
                "see to the server, then run the same command again: every answer so far is kept"
            )
        return Failure(job.row, job.turn, cause)

    def _check_prompt(self, job: Job, reply: Reply) -> None:
        """UsageError when the server's prompt ids differ from ours, or our template refuses the prompt."""
        if self.renderer is None or reply.prompt_token_ids is None:
            return
        try:
            ours = self.renderer.prompt_ids(job.messages(), job.row.tools, job.row.template_kwargs)
        except Unusable as refused:
            raise UsageError(
                f"{job.row.location}: the server answered a prompt, and it {refused}; "
                "name the same target with --model and the server"
            ) from refused
        self.renderer.compare(reply.prompt_token_ids, ours, job.row.location)


class _RateLimiter:
    """Delays requests to at most `rate` a minute, and while a Retry-After lasts."""

    def __init__(self, rate: float | None):
        self.interval_s = 60 / rate if rate else 0.0
        self.next_request_at = self.paused_until = 0.0

    async def wait(self) -> None:
        while True:
            now = time.monotonic()
            at = max(self.next_request_at, self.paused_until)
            if at <= now:
                self.next_request_at = max(self.next_request_at, now) + self.interval_s if self.interval_s else 0.0
                return
            await asyncio.sleep(at - now)

    def pause(self, seconds: float | None) -> None:
        """Pause all requests for the seconds of a Retry-After."""
        if seconds:
            self.paused_until = max(self.paused_until, time.monotonic() + min(seconds, MAX_RETRY_AFTER_S))


def _retry_after(headers) -> float | None:
    """Return the seconds of a Retry-After header, given as a number or a date."""
    stated = headers.get("retry-after")
    if not stated:
        return None
    with contextlib.suppress(ValueError):
        return max(float(stated), 0.0)
    with contextlib.suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(stated).timestamp() - time.time(), 0.0)
    return None


def _openai():
    try:
        import openai
    except ImportError as error:
        raise UsageError(
            "--endpoint needs the openai client, which is not installed; "
            "`pip install 'draft-pipeline[endpoint]'` installs it"
        ) from error
    return openai


def _base_url(given: str) -> str:
    """Return the base URL of requests; its path is /v1 where none is given."""
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"--endpoint {given}: no address of a server; wanted one like http://localhost:8000/v1")
    return urlunsplit(parts._replace(path=parts.path.rstrip("/") or "/v1"))


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    where = parts.hostname + (f":{parts.port}" if parts.port else "")
    return urlunsplit(parts._replace(netloc=where, query="", fragment=""))


def _is_local(url: str) -> bool:
    """Return whether a server is on this machine, so that no proxy is used."""
    host = urlsplit(url).hostname or ""
    with contextlib.suppress(ValueError):
        return ip_address(host).is_loopback
    return host == "localhost"
