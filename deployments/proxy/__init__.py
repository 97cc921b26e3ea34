"""What stands in Serve's HTTP proxy."""
