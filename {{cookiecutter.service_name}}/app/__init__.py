"""An inference service: `schemas` <- `core` <- `api` <- `main`; `observability` knows none of them."""
