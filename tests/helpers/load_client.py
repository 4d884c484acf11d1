"""A small load generator that speaks to a server as vLLM's `bench serve` does.

It asks GET /v1/models for the model's name, then posts all prompts at once to /v1/completions: streamed, with usage,
greedy, and to their full length whatever the model says.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Result:
    """One request; times in seconds. `gaps` lie between events that carry text."""

    text: str = ""
    num_prompt: int = 0
    num_output: int = 0
    num_events: int = 0
    first_token: float = 0.0
    whole: float = 0.0
    gaps: list[float] = field(default_factory=list)


async def measure(url: str, prompts: Sequence[str | list[int]], max_tokens: int) -> list[Result]:
    """Run all prompts together. Raises httpx.HTTPStatusError for an answer that is not 200."""
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        model = models["data"][0]["id"]
        return await asyncio.gather(*(_one(client, model, i, prompt, max_tokens) for i, prompt in enumerate(prompts)))


async def _one(client: httpx.AsyncClient, model: str, number: int, prompt: str | list[int], max_tokens: int) -> Result:
    body = {
        "model": model,
        "prompt": prompt,
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_tokens,
        "logprobs": None,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    result, begin = Result(), time.perf_counter()
    last = begin
    headers = {"Authorization": "Bearer none", "x-request-id": f"load-{number}"}
    async with client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        response.raise_for_status()
        async for event in _events(response):
            if event["choices"]:
                now = time.perf_counter()
                if result.num_events:
                    result.gaps.append(now - last)
                else:
                    result.first_token = now - begin
                result.text += event["choices"][0]["text"]
                result.num_events += 1
                last = now
            elif event.get("usage"):
                result.num_prompt = event["usage"]["prompt_tokens"]
                result.num_output = event["usage"]["completion_tokens"]
    result.whole = last - begin
    return result


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
