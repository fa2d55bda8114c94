"""Inference: pure jitted steps, and the loops on the host that drive them."""
