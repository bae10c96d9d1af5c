"""One JSON object a line on stdout, in one shape for this service's, uvicorn's and gunicorn's events.

    structlog event or foreign LogRecord -> render -> LineWriter (bounded) -> thread -> stdout

A reader that stops reading blocks the thread, never a request: lines are then dropped and counted.
Exceptions are written as their type and frames, without the message: messages quote data.
"""

import atexit
import logging
import os
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from time import sleep
from types import TracebackType
from typing import Any, Literal, Protocol

import orjson
import structlog

MAX_LINES = 10_000
PAUSE_SECONDS = 0.005  # lines that come within it share one write

Format = Literal["json", "console"]


class Logger(Protocol):
    """What this service uses of a structlog logger."""

    def info(self, event: str, **fields: Any) -> Any: ...
    def warning(self, event: str, **fields: Any) -> Any: ...
    def error(self, event: str, **fields: Any) -> Any: ...


class LineWriter:
    """Writes lines to a file descriptor from a thread of its own, dropping when too many wait."""

    def __init__(self, descriptor: int, max_lines: int = MAX_LINES) -> None:
        self._descriptor, self._max_lines = descriptor, max_lines
        self._lines: deque[bytes] = deque()
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.dropped: Callable[[], None] = lambda: None

    def write(self, line: bytes) -> None:
        """Queue one line without its newline."""
        if len(self._lines) >= self._max_lines:
            self.dropped()
            return
        self._lines.append(line)
        if self._thread is None:
            self._start()
        if not self._wake.is_set():
            self._wake.set()

    # structlog calls the method named after the level
    msg = debug = info = warning = error = critical = write

    def close(self, timeout: float = 2.0) -> None:
        """Write what is queued, for at most `timeout` seconds: a blocked reader must not hold up the exit."""
        self._closing = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout)

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._pump, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def _pump(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._lines:
                chunk = b"".join(self._lines.popleft() + b"\n" for _ in range(len(self._lines)))
                try:
                    while chunk:
                        chunk = chunk[os.write(self._descriptor, chunk) :]
                except OSError:  # the reader has gone; there is nobody left to tell
                    self.dropped()
            if self._closing:
                return
            sleep(PAUSE_SECONDS)


class _Direct:
    """Writes at once: for gunicorn's master, which must not have threads when it forks."""

    def write(self, line: bytes) -> None:
        os.write(1, line + b"\n")


class ForeignHandler(logging.Handler):
    """Records of libraries and servers, written in this service's shape."""

    def __init__(self, writer: LineWriter | _Direct, render: Callable[..., bytes]) -> None:
        super().__init__()
        self._writer, self._render = writer, render

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler`."""
        try:
            fields: dict[str, Any] = {"event": record.getMessage(), "logger": record.name}
            if record.exc_info and record.exc_info[1] is not None:
                fields["exc_info"] = record.exc_info[1]
            self._writer.write(self._render(None, record.levelname.lower(), fields))
        except Exception:
            self.handleError(record)


def configure_logging(level: str, fmt: Format) -> tuple[Logger, LineWriter]:
    """Route every logger of this process to stdout; returns this service's logger and the writer."""
    render = _renderer(fmt)
    writer = LineWriter(sys.stdout.fileno() if _has_descriptor() else 1)
    threshold = logging.getLevelNamesMapping()[level]
    logger: Logger = structlog.wrap_logger(
        writer,
        processors=[render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        context_class=dict,
    ).bind()
    handler = ForeignHandler(writer, render)
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.INFO), force=True)
    for name in ("gunicorn.error", "uvicorn.error"):
        foreign = logging.getLogger(name)
        foreign.handlers, foreign.propagate = [], True
    access = logging.getLogger("uvicorn.access")  # this service writes its own line a request
    access.handlers, access.propagate = [], False
    return logger, writer


def server_logging(fmt: Format) -> dict[str, Any]:
    """Gunicorn's `logconfig_dict`: what its master says, in the same shape."""
    handler = {"()": lambda: ForeignHandler(_Direct(), _renderer(fmt))}
    return {"version": 1, "handlers": {"stdout": handler}, "root": {"level": "INFO", "handlers": ["stdout"]},
            "loggers": {"gunicorn.error": {"level": "INFO", "handlers": ["stdout"], "propagate": False}}}  # fmt: skip


def _renderer(fmt: Format) -> Callable[..., bytes]:
    return _render_json if fmt == "json" else _render_console()


def _has_descriptor() -> bool:
    try:
        sys.stdout.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def _render_json(_logger: Any, level: str, fields: dict[str, Any]) -> bytes:
    line = {"timestamp": datetime.now(UTC), "level": level, **fields}
    if "exc_info" in line:
        line["exception"] = describe(line.pop("exc_info"))
    return orjson.dumps(line, default=str)


def _render_console() -> Callable[..., bytes]:
    console = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), sort_keys=False)

    def render(logger: Any, level: str, fields: dict[str, Any]) -> bytes:
        fields = {key: value for key, value in fields.items() if value is not None}
        error = fields.pop("exc_info", None)
        line = {"timestamp": f"{datetime.now():%H:%M:%S}", "level": level, **fields}
        text = console(logger, level, line)
        return (text if error is None else f"{text}\n{describe(error)}").encode()

    return render


def describe(error: BaseException) -> str:
    """Types and frames of an exception and its causes, oldest first, without their messages."""
    parts = []
    cause: BaseException | None = error
    while cause is not None:
        frames: TracebackType | None = cause.__traceback__
        parts.append("".join(traceback.format_tb(frames)) + type(cause).__qualname__)
        cause = cause.__cause__ or cause.__context__
    return "\ncaused\n".join(reversed(parts))
