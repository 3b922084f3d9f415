"""Seconds per phase."""

from __future__ import annotations

import time


class Timer:
    """Adds the seconds of a with-block, less those of timers running inside it, to a dict entry."""

    def __init__(self, seconds: dict[str, float], name: str, running: list[Timer]):
        self.seconds, self.name, self.running = seconds, name, running
        self.inner = 0.0

    def __enter__(self) -> None:
        self.running.append(self)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        took = time.perf_counter() - self.start
        self.running.pop()
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + took - self.inner
        if self.running:
            self.running[-1].inner += took
