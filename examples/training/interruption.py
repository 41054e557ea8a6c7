"""Ctrl-C and SIGTERM as wishes, which a loop grants when it has something whole to leave behind."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from experiment import main_process


class Interruption:
    """Within ``with``, the first signal only sets ``wanted``; a second Ctrl-C raises as ever.

    >>> with Interruption() as interruption:
    ...     interruption.wanted
    False
    """

    def __init__(self) -> None:
        self.wanted = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if main_process():
            # Not print, which a signal may find halfway through another print.
            os.write(2, b"\nStopping after this step; Ctrl-C stops at once.\n")
