"""One command for a card: what this project does on it, measured beside diffusers."""
