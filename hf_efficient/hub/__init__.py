"""Models as folders for the Hub, with the code that loads them where this package is not installed.

`export` writes such a folder, `push_to_hub` uploads one, and `python -m hf_efficient.hub --help` does both from a
terminal.
"""

from .exporting import export, family_of, push_to_hub, write_code


__all__ = ["export", "family_of", "push_to_hub", "write_code"]
