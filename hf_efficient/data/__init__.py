"""Corpora, packed blocks, GLUE, and a built-in corpus and task; built on `datasets`."""
