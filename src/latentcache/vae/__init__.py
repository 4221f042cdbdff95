"""The KL autoencoder: its modules, its checkpoints, and encoding with it."""
