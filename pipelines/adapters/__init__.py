"""LoRAs and related adapters, applied row by row."""
