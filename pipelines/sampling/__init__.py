"""Samplers, their schedules, and latents."""
