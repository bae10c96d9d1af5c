"""Names the service under test: the folder in PROVE_SERVICE, or the template's own, in place.

`tests/service/__init__.py` imports this first, so that `app`, `server` and `lifecycle` are that folder's.
"""

import os
import sys
from pathlib import Path

TEMPLATE = Path(__file__).resolve().parents[2]
SERVICE = "{{cookiecutter.service_name}}"
ROOT = Path(os.environ.get("PROVE_SERVICE") or TEMPLATE / SERVICE).resolve()

sys.path.insert(0, str(ROOT))
