"""Helpers that know no model: what every other part of the package may import."""
