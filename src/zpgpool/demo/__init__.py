"""The demo: a small application behind the middleware, on a PostgreSQL of its own."""
