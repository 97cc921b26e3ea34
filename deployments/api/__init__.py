"""The HTTP API: routes, requests, replies."""
