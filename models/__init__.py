"""Causal video DiT, attention, rope, autoencoder, conditioning, weights."""
