"""Activations times quantized weights, dequantized on the way."""
