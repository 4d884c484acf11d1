"""The requests of `octavo bench serve`: streamed completions of prompts that are token ids, and their times."""

import asyncio
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
from octavo.errors import OctavoError
from tqdm import tqdm

from octavo_workbench.http_client import Address, HTTPError, request
from octavo_workbench.workloads import Job


@dataclass(frozen=True, slots=True)
class Target:
    """A request to make, `start` seconds after the first."""

    job: Job
    start: float


@dataclass(slots=True)
class Served:
    """What became of a request; times are seconds, `gaps` those between events that bring tokens."""

    num_prompt_tokens: int
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None

    def measure(self, name: str) -> float:
        """ttft: until the first event. tpot: from there to the last one, by token. e2el: until the last event."""
        if name == "tpot":
            return (self.last - self.first) / max(1, self.num_output_tokens - 1)
        return self.first if name == "ttft" else self.last


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(_Event)


@dataclass(frozen=True, slots=True)
class Server:
    """The server under load. With `salted`, requests carry a cache_salt that no earlier run had."""

    address: Address
    model: str
    api_key: str | None = None
    salted: bool = False
    salt: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def headers(self) -> dict[str, str]:
        """What each request says of itself."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def body(self, job: Job) -> bytes:
        """A greedy completion of all the job's tokens, whatever the model says."""
        content: dict[str, Any] = {
            "model": self.model,
            "prompt": job.prompt_token_ids,
            "max_tokens": job.num_output_tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        return msgspec.json.encode(content | ({"cache_salt": self.salt} if self.salted else {}))


async def find_model(server: Server) -> str:
    """The name of the first model that the server lists. Raises HTTPError."""
    async with request(server.address, "GET", "/v1/models", headers=server.headers) as answer:
        body = await answer.body()
        if answer.status != 200:
            raise HTTPError(f"GET /v1/models is answered {answer.status}: {body.decode(errors='replace')[:300]}")
    name: str = json.loads(body)["data"][0]["id"]
    return name


async def drive(
    server: Server, targets: Sequence[Target], max_concurrency: int | None, progress: str
) -> tuple[list[Served], float]:
    """Make the requests, each at its time; what became of each, and the seconds from the first start to the last end.

    `progress` names the bar; none is shown without a name.
    """
    slots = asyncio.Semaphore(max_concurrency or len(targets))
    begin = time.perf_counter()
    with tqdm(total=len(targets), desc=progress, unit="request", leave=False, disable=not progress) as bar:

        async def one(target: Target) -> Served:
            await asyncio.sleep(begin + target.start - time.perf_counter())
            async with slots:
                served = await complete(server, target.job)
            bar.update(1)
            return served

        served = await asyncio.gather(*(one(target) for target in targets))
    return served, time.perf_counter() - begin


async def complete(server: Server, job: Job) -> Served:
    """Make one request. Its time begins before the connection does; an error is told in the result."""
    served, begin = Served(len(job.prompt_token_ids)), time.perf_counter()
    body = server.body(job)
    try:
        async with request(server.address, "POST", "/v1/completions", body, server.headers) as answer:
            async for data in answer.events():
                if data != b"[DONE]":
                    _take(served, _decoder.decode(data), time.perf_counter() - begin)
    except (OctavoError, OSError, msgspec.MsgspecError) as error:
        served.error = f"{type(error).__name__}: {error}"
    if served.error is None and served.num_output_tokens != job.num_output_tokens:
        served.error = f"{served.num_output_tokens} tokens came, not {job.num_output_tokens}"
    return served


def _take(served: Served, event: _Event, now: float) -> None:
    """Count an event that came `now` seconds after the start. Usage, if it comes, says how many tokens there were."""
    if event.error is not None:
        raise HTTPError(f"The stream ended in an error: {str(event.error)[:300]}")
    if event.choices:
        if served.first:
            served.gaps.append(now - served.last)
        else:
            served.first = now
        served.last = now
        served.num_output_tokens += 1
    if event.usage is not None and event.usage.completion_tokens:
        served.num_output_tokens = event.usage.completion_tokens
        details = event.usage.prompt_tokens_details
        served.num_cached_tokens = (details.cached_tokens or 0) if details else 0
