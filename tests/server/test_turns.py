"""New requests begin a few at a time, so that what else is due comes between them."""

import asyncio
from itertools import pairwise

import pytest
from octavo_server.turns import Turns
from starlette.types import Message, Receive, Scope, Send

CROWD = 300


async def receive() -> Message:
    return {"type": "http.disconnect"}


async def send(message: Message) -> None:
    pass


class Counted:
    """An application that counts its requests."""

    def __init__(self) -> None:
        self.begun: list[int] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun.append(scope["number"])


async def looks(app: Counted) -> list[int]:
    """How many have begun, each time that the loop comes round, until all have."""
    seen = [0]
    for _ in range(10 * CROWD):
        await asyncio.sleep(0)
        seen.append(len(app.begun))
        if seen[-1] >= CROWD:
            break
    return seen


def crowd(turns: Turns, *numbers: int) -> list["asyncio.Task[None]"]:
    return [asyncio.create_task(turns({"type": "http", "method": "POST", "number": n}, receive, send)) for n in numbers]


async def test_a_crowd_begins_in_its_order_and_in_small_groups() -> None:
    app = Counted()
    tasks = crowd(Turns(app), *range(CROWD))
    seen = await looks(app)
    await asyncio.gather(*tasks)
    assert app.begun == list(range(CROWD))
    assert max(b - a for a, b in pairwise(seen)) <= 64


async def test_one_that_gives_up_waiting_takes_nobodys_turn() -> None:
    app = Counted()
    tasks = crowd(Turns(app), *range(CROWD))
    await asyncio.sleep(0)
    for task in tasks[100:200]:
        task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert app.begun == [*range(100), *range(200, CROWD)]
    assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 100


@pytest.mark.parametrize("pause", [0, 1, 3])
async def test_those_that_come_one_by_one_do_not_wait(pause: int) -> None:
    app = Counted()
    turns = Turns(app)
    for number in range(30):
        (task,) = crowd(turns, number)
        await asyncio.sleep(0)  # it runs as soon as the loop comes round
        assert len(app.begun) == number + 1
        await task
        for _ in range(pause):
            await asyncio.sleep(0)
