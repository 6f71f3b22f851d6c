"""TUPE-BERT: an encoder whose positions are untied from its tokens (arXiv 2006.15595)."""
