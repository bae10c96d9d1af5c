"""Yours: features that are fetched by key from another system. Off until this file has `async def lookup`.

    async def lookup(instances: list[dict[str, Any]], deadline: float) -> list[dict[str, Any] | None]: ...

docs/own_code.md explains it, with an example that uses Redis.
"""
