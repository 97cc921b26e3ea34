"""Times, metrics, logs, traces."""
