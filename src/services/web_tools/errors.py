"""Why a URL could not be read.

The tree:

    Exception
        FetchFailedError            one URL gave no page: a `SkipCode` and a reason for people
            AddressRefusedError     its host is an address that may not be fetched
"""

from __future__ import annotations

from toolfleet.services.web_tools.models import SkipCode


class FetchFailedError(Exception):
    """A URL gave no page.

    Attributes:
        code: the class of the failure, for programs.
        reason: one sentence that says what happened and, where somebody can do something, what.
    """

    def __init__(self, code: SkipCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class AddressRefusedError(FetchFailedError):
    """The host is, or resolves to, an address that may not be fetched."""

    def __init__(self, reason: str) -> None:
        super().__init__(SkipCode.ADDRESS_REFUSED, reason)
