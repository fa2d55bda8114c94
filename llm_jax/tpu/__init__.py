"""A laboratory for TPU programs on a machine without a TPU: compile, read the final code, count its
cycles.
"""
