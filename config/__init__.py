"""What this server offers and how this process is set up: data, checked once. Imports nothing of ours, no torch, no ray."""
