"""The Scaling Transformer."""
