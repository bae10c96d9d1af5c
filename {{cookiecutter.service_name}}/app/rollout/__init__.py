"""Which versions serve: the released one, and a canary or a shadow beside it."""
