"""Synthetic images and the weights of a small VAE, for demos and tests."""
