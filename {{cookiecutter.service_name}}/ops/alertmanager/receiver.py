"""A sample receiver that prints a line for each alert; replace it by your pager and your ticket system.

Alertmanager -> POST /page, /ticket or /unrouted -> stdout, which `docker compose logs receiver` shows
"""

import json
import sys
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Tell = Callable[[str, dict[str, Any]], None]  # the path (the receiver's name), and Alertmanager's message


class Receiver(ThreadingHTTPServer):
    """Takes Alertmanager's messages at `address` and passes them to `tell`."""

    def __init__(self, address: tuple[str, int], tell: Tell) -> None:
        super().__init__(address, _Handler)
        self.tell = tell


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tell(self.path, json.loads(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Write no line per request: only alerts are printed."""


def show(path: str, message: dict[str, Any]) -> None:
    """A line of JSON for each alert in a message."""
    for alert in message["alerts"]:
        line = {"to": path.lstrip("/"), "status": alert["status"], **alert["labels"], **alert["annotations"]}
        sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    Receiver(("", int(sys.argv[1])), show).serve_forever()
