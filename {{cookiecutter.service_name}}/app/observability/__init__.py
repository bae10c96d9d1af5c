"""Logs, metrics and traces. Known by core, api and main; knows none of them."""
