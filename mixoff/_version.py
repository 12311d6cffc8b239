"""The version, which stores and conversions record."""

__version__ = "0.1.0"
