"""`breaks` of the service's `tests/compatibility.py`, loaded by its path: both folders are called `tests`."""

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

from tests.service.where import ROOT

_spec = spec_from_file_location("compatibility", ROOT / "tests" / "compatibility.py")
assert _spec
assert _spec.loader
_module = module_from_spec(_spec)
_spec.loader.exec_module(_module)
breaks: Callable[[dict[str, Any], dict[str, Any]], list[str]] = _module.breaks
