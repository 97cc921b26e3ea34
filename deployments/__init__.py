"""The Ray Serve graph: a request in, a chain of deployments composed for it, a picture out."""

__version__ = "0.1.0"
