"""What repairs a quantized network."""
