"""Many requests at once on one device: pages, prefixes, a schedule of steps."""
