"""ControlNet: control maps, residuals, and how residuals reach the UNet."""
