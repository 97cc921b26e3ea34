"""A Serve config for a catalog and the cards at hand."""
