"""HTTP: routes, middleware, errors, security. Knows schemas and core, never a model runtime."""
