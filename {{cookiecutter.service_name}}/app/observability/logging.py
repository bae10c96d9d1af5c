"""JSON lines on stdout, in one format for events of this service, uvicorn and gunicorn.

    structlog event or LogRecord -> render -> LineWriter (bounded) -> thread -> stdout

A reader that stops reading blocks the thread, never a request: lines are then dropped and counted.
Exceptions are written as types and frames without messages, because messages may quote data.
"""

import atexit
import json
import logging
import os
import select
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from queue import SimpleQueue
from time import sleep
from typing import Any, Literal

import orjson
import structlog

MAX_LINES = 10_000
PAUSE_SECONDS = 0.02  # lines within this time share one write
STDOUT = 1

Format = Literal["json", "console"]
Logger = structlog.typing.FilteringBoundLogger
RequestLine = Callable[[bool, dict[str, Any]], None]  # whether the request failed, and the fields


class LineWriter:
    """Writes lines from a thread of its own, and drops them when too many wait."""

    def __init__(self, on_drop: Callable[[int], None], to: int = STDOUT, max_lines: int = MAX_LINES) -> None:
        self._on_drop, self._descriptor, self._max_lines = on_drop, to, max_lines
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()  # None ends the thread
        self._thread = threading.Thread(target=self._pump, name="log", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, line: bytes) -> None:
        """Queue one line, without its newline."""
        if self._lines.qsize() < self._max_lines:
            self._lines.put(line)
        else:
            self._on_drop(1)

    # structlog calls the method that is named after the level
    debug = info = warning = error = write

    def close(self, timeout: float = 2.0) -> None:
        """Write the queued lines within `timeout` seconds: a blocked reader must not delay the exit."""
        self._lines.put(None)
        self._thread.join(timeout)

    def _pump(self) -> None:
        lines: list[bytes | None] = []
        while None not in lines:
            lines = [self._lines.get()]
            lines += [self._lines.get() for _ in range(min(self._lines.qsize(), self._max_lines - 1))]
            chunk = b"".join(line + b"\n" for line in lines if line is not None)
            try:
                while chunk:
                    chunk = chunk[os.write(self._descriptor, chunk) :]
            except OSError:  # the reader is gone
                self._on_drop(chunk.count(b"\n"))
            sleep(PAUSE_SECONDS if None not in lines else 0)


class ForeignHandler(logging.Handler):
    """Log records of libraries and servers, in the format of this service."""

    def __init__(self, fmt: Format, write: Callable[[bytes], None] | None = None) -> None:
        super().__init__()
        self._render = _RENDER[fmt]
        # Without a writer, write directly: gunicorn's master must not have threads when it forks.
        self._write = write or _write_now

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, without its arguments if they do not fit the message."""
        try:
            # asyncio's message quotes the arguments and the error; the frames below are enough.
            message = "an error on the event loop" if record.name == "asyncio" else record.getMessage()
        except (TypeError, ValueError):  # a bad log call must not raise in the caller
            message = str(record.msg)
        fields: dict[str, Any] = {"event": message, "logger": record.name, **getattr(record, "fields", {})}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exc_info"] = record.exc_info[1]
        self._write(self._render(None, record.levelname.lower(), fields))


def configure_logging(
    level: str, fmt: Format, on_drop: Callable[[int], None]
) -> tuple[Logger, RequestLine, LineWriter]:
    """Route every logger of this process to stdout; returns this service's logger and the writers.

    `on_drop` gets the number of dropped lines, and is called in any thread.
    """
    writer, threshold, render = LineWriter(on_drop), logging.getLevelNamesMapping()[level], _RENDER[fmt]
    bound = structlog.make_filtering_bound_logger(threshold)
    logger: Logger = structlog.wrap_logger(writer, processors=[render], wrapper_class=bound).bind()
    handler = ForeignHandler(fmt, writer.write)
    logging.basicConfig(handlers=[handler], level=max(threshold, logging.INFO), force=True)
    for name in ("gunicorn.error", "uvicorn.error", "uvicorn.access"):
        foreign = logging.getLogger(name)
        foreign.handlers = []
        foreign.propagate = name != "uvicorn.access"  # this service logs requests itself
    logging.captureWarnings(True)
    threading.excepthook = lambda failed: logger.error("a thread failed", exc_info=failed.exc_value)

    def request_line(failed: bool, fields: dict[str, Any]) -> None:
        """Like a call of the logger, but without its four copies of the fields, which double the cost."""
        if failed or threshold <= logging.INFO:
            writer.write(render(None, "error" if failed else "info", fields))

    return logger, request_line, writer


def server_logging(fmt: Format) -> dict[str, Any]:
    """Gunicorn's `logconfig_dict`: the master's lines in the same format."""
    logger = {"level": "INFO", "handlers": ["stdout"], "propagate": False}
    handlers = {"stdout": {"()": ForeignHandler, "fmt": fmt}}
    return {"version": 1, "handlers": handlers, "root": logger, "loggers": {"gunicorn.error": logger}}


def describe(error: BaseException | None) -> str:
    """Types and frames of an exception and its causes, first cause first, without messages."""
    parts: list[str] = []
    while error is not None:
        parts.insert(0, "".join(traceback.format_tb(error.__traceback__)) + type(error).__qualname__)
        error = error.__cause__ or error.__context__
    return "\ncaused\n".join(parts)


def _write_now(line: bytes) -> None:
    """For gunicorn's master, which must have no threads: write, unless the reader is blocked or gone."""
    left = line + b"\n"
    with suppress(OSError, ValueError):  # ValueError: standard output is closed
        while left and select.select([], [STDOUT], [], 0)[1]:
            left = left[os.write(STDOUT, left[: select.PIPE_BUF]) :]  # a pipe takes this without blocking


def _json(_logger: Any, level: str, fields: dict[str, Any]) -> bytes:
    line = {"timestamp": datetime.now(UTC), "level": level, **fields}
    if "exc_info" in line:
        line["exception"] = describe(line.pop("exc_info"))
    try:
        return orjson.dumps(line, default=str)
    except TypeError:  # a lone surrogate, a number of more than 64 bits
        return json.dumps(line, default=str, skipkeys=True).encode()


def _console(logger: Any, level: str, fields: dict[str, Any]) -> bytes:
    line = {"timestamp": f"{datetime.now(UTC).astimezone():%H:%M:%S}", "level": level, **fields}
    error = line.pop("exc_info", None)
    shown = {key: value for key, value in line.items() if value is not None}
    text = structlog.dev.ConsoleRenderer(colors=sys.stdout.isatty(), sort_keys=False)(logger, level, shown)
    return f"{text}\n{describe(error)}".strip().encode()


_RENDER: dict[Format, Callable[[Any, str, Any], bytes]] = {"json": _json, "console": _console}
