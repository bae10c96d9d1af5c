"""The game day: break a service on purpose; every alert has to fire. `make gameday SERVICE=path`."""
