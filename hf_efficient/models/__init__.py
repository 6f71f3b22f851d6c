"""Model families, one folder each; `hf_efficient.auto` lists them."""
