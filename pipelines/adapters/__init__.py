"""LoRA and its kin, row by row."""
