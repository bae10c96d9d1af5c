"""Processes and connections: gunicorn's workers, their end, and the HTTP protocol."""
