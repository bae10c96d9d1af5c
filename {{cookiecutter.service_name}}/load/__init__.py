"""Load test: realistic traffic, and a gate with the numbers of slo.toml."""
