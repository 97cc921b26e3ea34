"""ControlNet: maps, residuals, their binding."""
