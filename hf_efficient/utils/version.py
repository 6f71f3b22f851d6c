"""Version of the package, for what may not import its root."""

__version__ = "0.1.0.dev0"
