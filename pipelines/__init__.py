"""Pure diffusion code: no Ray, no HTTP, no environment. Start with `text2image.py`."""
