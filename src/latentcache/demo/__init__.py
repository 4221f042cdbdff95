"""Drawn images and the weights of a small autoencoder, to try everything on."""
