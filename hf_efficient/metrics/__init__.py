"""Metrics as `evaluate.Metric`s that need no download."""
