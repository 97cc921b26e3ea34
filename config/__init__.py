"""What this server offers and how this process is set up: data, checked once. No torch, no ray."""
