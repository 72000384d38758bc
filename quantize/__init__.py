"""Weight-only quantization: formats, packing and the methods that choose the integers."""
