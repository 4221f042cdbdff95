"""Whether a dataset is what it says it is."""
