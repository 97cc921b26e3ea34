"""LoRAs, row by row."""
