"""Terraformer."""
