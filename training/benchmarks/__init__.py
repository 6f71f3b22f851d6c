"""Measurements of speed and quality; `python -m training.benchmarks --list` names them."""
