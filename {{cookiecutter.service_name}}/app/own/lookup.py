"""Yours: features that are fetched from elsewhere by key. Off until this file has `async def lookup`.

    async def lookup(instances: list[dict[str, Any]], deadline: float) -> list[dict[str, Any] | None]: ...

docs/own_code.md says how, and shows one with Redis.
"""
