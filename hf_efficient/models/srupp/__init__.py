"""SRU and SRU++: fast recurrence, with attention inside where it pays (arXiv 1709.02755, 2102.12459)."""
