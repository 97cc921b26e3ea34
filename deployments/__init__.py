"""The Ray Serve graph: thin shells around `pipelines`. `app.py` is the whole graph on one page."""
