"""How a merge tells about itself: a bar on a terminal, a plain line now and then elsewhere, nothing if asked."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from ggez_merge.units import readable_bytes

LINE_EVERY_S = 10.0


class Silent:
    """Says nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def phase(self, name: str, total_bytes: int) -> None:
        pass

    def advance(self, n_bytes: int) -> None:
        pass


class Lines(Silent):
    """A line every LINE_EVERY_S seconds on standard error: for logs and pipes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.phase("", 0)

    def phase(self, name: str, total_bytes: int) -> None:
        self._name, self._total, self._done = name, total_bytes, 0
        self._began = self._said = time.monotonic()

    def advance(self, n_bytes: int) -> None:
        with self._lock:
            self._done += n_bytes
            now = time.monotonic()
            if now - self._said < LINE_EVERY_S or not self._total:
                return
            self._said = now
            rate = self._done / (now - self._began)
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"{self._name}: {readable_bytes(self._done)} of {readable_bytes(self._total)} "
                f"({readable_bytes(rate)}/s, {left:.0f} s left)",
                file=sys.stderr,
                flush=True,
            )


class Bar(Silent):
    """A progress bar in bytes, with rate and time left, on standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._progress: Any = Progress(
            TextColumn("{task.description:>9}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, name: str, total_bytes: int) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(name, total=total_bytes)

    def advance(self, n_bytes: int) -> None:
        self._progress.advance(self._task, n_bytes)


def progress_for(quiet: bool) -> Silent:
    """The fitting way to show progress right now."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else Lines()
