"""One test for each assumption about a library that the library does not promise: what to run after an upgrade."""
