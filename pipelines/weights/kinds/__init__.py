"""Which kind of file a header belongs to."""
