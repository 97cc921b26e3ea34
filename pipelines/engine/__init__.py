"""Rows of different jobs in one UNet evaluation."""
