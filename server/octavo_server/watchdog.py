"""Watches that the engine makes steps."""

import asyncio

from octavo.async_engine import AsyncEngine

_MOST_SECONDS = 1.0


async def watch_steps(engine: AsyncEngine, timeout: float) -> None:
    """Kill the engine once it has made no step for `timeout` seconds while requests wait for one. Runs until cancelled.

    Every open request then ends with an error; whoever waits for the engine's end learns of it.
    """
    while True:
        await asyncio.sleep(min(_MOST_SECONDS, timeout / 4))
        if engine.stalled_seconds > timeout:
            engine.kill(
                f"The engine made no step for {timeout:g} s while requests ran (--engine-timeout); it was ended."
            )
            return
