"""What the quantize stage does for each scheme, one file a kind of scheme."""
