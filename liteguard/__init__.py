"""LiteGuard: from a small language model to a medical assistant on a phone."""

__version__ = "0.1.0"
