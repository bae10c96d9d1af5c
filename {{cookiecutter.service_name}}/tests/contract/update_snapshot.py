"""`python -m tests.contract.update_snapshot`: write what the service says of itself to openapi.json.

A change that breaks clients is refused; `--breaking` writes it all the same.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.conftest import ROOT, serving
from tests.contract.compatibility import breaks

SNAPSHOT = ROOT / "openapi.json"


def main() -> None:
    """Start the service, ask it, compare, write."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as service:
        live: dict[str, Any] = service.client.get("/openapi.json").json()
    if SNAPSHOT.exists() and "--breaking" not in sys.argv[1:]:
        broken = breaks(json.loads(SNAPSHOT.read_text("utf-8")), live)
        if broken:
            sys.exit("\n".join(["clients would break; if you mean it, repeat with --breaking:", *broken]))
    SNAPSHOT.write_text(json.dumps(live, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
