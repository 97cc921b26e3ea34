"""What several suites need: requests and replies, graphs, processes. No tests here."""
