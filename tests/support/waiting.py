"""Waiting for a condition, bounded; the only place in the tests that sleeps."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

_POLL_SECONDS = 0.01


@overload
async def wait_until(predicate: Callable[[], Awaitable[T]], description: str, timeout: float = 10) -> T: ...
@overload
async def wait_until(predicate: Callable[[], T], description: str, timeout: float = 10) -> T: ...
async def wait_until(predicate: Callable[[], object], description: str, timeout: float = 10) -> object:
    """Calls `predicate` until what it returns (or resolves to) is true, and returns that.

    Args:
        predicate: cheap and free of side effects; it may be async.
        description: completes "timed out waiting until ...".
        timeout: seconds; generous, since it only bounds a failing test.

    Raises:
        AssertionError: the condition did not come about in time; the message has the last value.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {timeout:g} s waiting until {description}; last value: {value!r}")
        await asyncio.sleep(_POLL_SECONDS)
