"""When a failed attempt is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.background_jobs.retry_policy import RetryPolicy, spread_ms

delays = st.lists(st.floats(0, 86_400), min_size=1, max_size=5)
jitters = st.floats(0, 1)
chances = st.floats(0, 1, exclude_max=True)
retries = st.integers(0, 100)


@given(delays, jitters, chances, retries)
def test_a_delay_lies_between_its_base_and_base_plus_jitter(
    bases: list[float], jitter: float, chance: float, retry: int
) -> None:
    base = bases[min(retry, len(bases) - 1)] * 1000
    delay = RetryPolicy(tuple(bases), jitter).delay_ms(retry, chance)
    assert int(base) <= delay <= base * (1 + jitter)


@given(delays, jitters, chances, retries)
def test_growing_delays_stay_growing(bases: list[float], jitter: float, chance: float, retry: int) -> None:
    policy = RetryPolicy(tuple(sorted(bases)), jitter)
    assert policy.delay_ms(retry, chance) <= policy.delay_ms(retry + 1, chance)


@given(delays, jitters, chances, chances, retries)
def test_more_chance_never_means_less_delay(
    bases: list[float], jitter: float, low: float, high: float, retry: int
) -> None:
    low, high = sorted((low, high))
    policy = RetryPolicy(tuple(bases), jitter)
    assert policy.delay_ms(retry, low) <= policy.delay_ms(retry, high)


@given(st.integers(0, 20), st.integers(0, 20))
def test_the_limit_is_the_number_of_retries(done: int, limit: int) -> None:
    assert RetryPolicy().allows(done, limit) == (done < limit)


def test_the_default_waits_30_and_then_60_seconds() -> None:
    policy = RetryPolicy()
    assert [policy.delay_ms(n, 0) for n in range(3)] == [30_000, 60_000, 60_000]


@given(st.integers(0, 30 * 86_400_000), chances)
def test_a_spread_is_later_never_earlier_and_by_a_tenth_at_most(delay: int, chance: float) -> None:
    assert delay < spread_ms(delay, chance) <= delay + max(50, delay * 0.1) + 1


@pytest.mark.parametrize(("delays_s", "jitter"), [((), 0.2), ((-1.0,), 0.2), ((1.0,), 1.5), ((1.0,), -0.1)])
def test_a_policy_that_makes_no_sense_is_refused(delays_s: tuple[float, ...], jitter: float) -> None:
    with pytest.raises(ValueError, match="retry"):
        RetryPolicy(delays_s, jitter)
