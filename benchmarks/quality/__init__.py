"""What settings of the engine cost in quality, against the 16-bit model."""
