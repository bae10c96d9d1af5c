"""Yours: the place for features that are fetched from elsewhere by key. Not called by this release.

The intended shape, for a whole batch at once, with `deadline` as a time of `time.perf_counter`:

    async def lookup(instances, deadline): ...
"""
