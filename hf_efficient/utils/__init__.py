"""Helpers without knowledge of any model, for every other part of the package to import."""
