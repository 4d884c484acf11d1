"""Work for a client that may leave."""

import asyncio
from typing import Any

import pytest
from octavo_server.streaming import _until_gone
from starlette.types import Message


class Client:
    """Leaves when it is told to."""

    def __init__(self) -> None:
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}


async def test_work_begins_before_the_loop_comes_round() -> None:
    begun: list[int] = []

    async def work() -> int:
        begun.append(1)
        await asyncio.sleep(0)
        return 7

    task = asyncio.create_task(_until_gone(Client().receive, work()))
    await asyncio.sleep(0)
    assert begun == [1]
    assert await task == 7


async def test_a_client_that_leaves_ends_the_work() -> None:
    client, ended = Client(), []

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(1)
            raise

    asyncio.get_running_loop().call_later(0.01, client.left.set)
    assert await _until_gone(client.receive, work()) is None
    assert ended == [1]


async def test_a_client_that_leaves_as_the_work_ends_disturbs_nobody() -> None:
    client, done, errors = Client(), asyncio.Event(), []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.append(context))

    async def work() -> int:
        await done.wait()
        return 7

    def both() -> None:
        client.left.set()
        done.set()

    loop.call_later(0.01, both)
    assert await _until_gone(client.receive, work()) in (7, None)
    await asyncio.sleep(0.01)
    assert errors == []


@pytest.mark.parametrize("error", [TimeoutError("its own"), ValueError("another")])
async def test_errors_of_the_work_are_raised(error: Exception) -> None:
    async def work() -> Any:
        raise error

    with pytest.raises(type(error), match=str(error)):
        await _until_gone(Client().receive, work())


async def test_a_cancelled_request_is_cancelled() -> None:
    async def work() -> None:
        await asyncio.sleep(60)

    task = asyncio.create_task(_until_gone(Client().receive, work()))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
