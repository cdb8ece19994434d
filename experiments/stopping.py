"""Stop a run between two steps when the system or the user asks, so that it can be saved and resumed."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was stopped by a signal, after its state was saved."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"by {signal.Signals(number).name} {where}")
        self.signal = number


class Stop:
    """Remember SIGTERM or Ctrl-C while the `with` statement lasts; a second one acts as it always does."""

    signal = 0

    def __call__(self) -> bool:
        return bool(self.signal)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        self._put_back()

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._heard) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: Any) -> None:
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
