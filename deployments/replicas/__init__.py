"""The actors that compute."""
