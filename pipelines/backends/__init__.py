"""UNet implementations behind one protocol."""
