"""Modules and helpers that model families share."""
