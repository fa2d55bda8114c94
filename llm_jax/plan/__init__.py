"""A quote for any TPU slice without a TPU: does a model fit, how fast is it, what does it cost."""
