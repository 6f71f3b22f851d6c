"""Text and tables: corpora, packed blocks, GLUE and the built-in corpus and task; on top of `datasets`."""
