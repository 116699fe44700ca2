"""Fast layers for patch transformers."""

__version__ = "0.1.0"
