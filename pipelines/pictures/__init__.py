"""Latents to pictures and back."""
