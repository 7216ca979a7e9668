"""When a failed attempt is tried again. Pure: randomness is handed in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Delays before the retries of a job.

    The default, 30 s and 60 s with up to a fifth more, lets a tool server restart in between and does not bring all
    jobs of an outage back in the same second.
    """

    delays_s: tuple[float, ...] = (30.0, 60.0)
    """Before the first, the second … retry; the last one repeats."""
    jitter: float = 0.2
    """A delay is multiplied by a factor from 1 to 1 + this."""

    def __post_init__(self) -> None:
        if not self.delays_s or min(self.delays_s) < 0:
            raise ValueError("retry delays are one or more numbers of seconds, none below 0")
        if not 0 <= self.jitter <= 1:
            raise ValueError("retry jitter is a fraction from 0 to 1")

    def allows(self, retries: int, max_retries: int) -> bool:
        """Whether another retry follows after so many."""
        return retries < max_retries

    def delay_ms(self, retries: int, chance: float) -> int:
        """Milliseconds before the next retry.

        Args:
            retries: how many there were, from 0.
            chance: a random number in [0, 1).
        """
        base = self.delays_s[min(retries, len(self.delays_s) - 1)]
        return int(base * 1000 * (1 + self.jitter * chance))


def spread_ms(delay_ms: int, chance: float) -> int:
    """A hand-back delay with up to a tenth and at least 50 ms more, so that those who wait for one lease do not all
    come back in the millisecond in which it ends."""
    return delay_ms + int(max(50, delay_ms * 0.1) * chance) + 1
