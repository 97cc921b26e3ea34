"""The Ray Serve graph: thin shells around `pipelines`. `app.py` is the whole graph on one page."""

__version__ = "0.1.0"
