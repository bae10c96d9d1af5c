"""Cases of a capability are collected where the service under test has that capability."""

from app.settings import VARIABLES, installed

collect_ignore = [f"test_{name.replace('-', '_')}.py" for name in VARIABLES if name not in installed()]
