"""The ingress replica: one request composed over the graph."""
