"""AUTOMATIC1111's web API at the root (`/sdapi/v1/*`, `/controlnet/*`), so that its clients reach the same models.

Wire shapes are those of A1111 1.10 and Forge. What is global there (options, progress, interrupt) is the caller's own.
"""
