"""A collector of spans, in a process of its own."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.service.conftest import begin, end, until

COLLECTOR = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from google.protobuf.json_format import MessageToJson
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

class Collector(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        message = ExportTraceServiceRequest.FromString(body)
        print(self.path, MessageToJson(message, indent=None), flush=True)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass

server = HTTPServer(("127.0.0.1", 0), Collector)
print(server.server_port, flush=True)
server.serve_forever()
"""


class Collector:
    """A process that takes OTLP over HTTP, and what it was sent."""

    def __init__(self, folder: Path) -> None:
        (folder / "collector.py").write_text(COLLECTOR)
        self._log = folder / "collector.log"
        with self._log.open("wb") as output:
            self.process = begin(folder, "collector", stdout=output)
        port = until(lambda: self._log.read_text().partition("\n")[0], "the collector")
        self.url = f"http://127.0.0.1:{port}"

    @property
    def text(self) -> str:
        """Everything it was sent, as JSON."""
        return self._log.read_text()

    def spans(self) -> list[dict[str, Any]]:
        """Every span, with `trace_id` in hex and `attributes` by name."""
        found = []
        for line in self.text.splitlines()[1:]:
            path, _, document = line.partition(" ")
            assert path == "/v1/traces"
            for resource in json.loads(document)["resourceSpans"]:
                for span in (one for scope in resource["scopeSpans"] for one in scope["spans"]):
                    attributes = {one["key"]: one["value"] for one in span.get("attributes", [])}
                    trace_id = base64.b64decode(span["traceId"]).hex()
                    found.append({**span, "trace_id": trace_id, "attributes": attributes})
        return found

    def span(self, trace_id: str) -> dict[str, Any]:
        """The server's span of this trace, once it is there."""
        return until(
            lambda: next((one for one in self.spans() if one["trace_id"] == trace_id), None), "the span"
        )


@contextmanager
def collecting(folder: Path) -> Iterator[Collector]:
    """A collector that runs until the block ends."""
    one = Collector(folder)
    try:
        yield one
    finally:
        end(one.process)
