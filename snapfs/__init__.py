"""Point-in-time views of a live disk image, as files."""

__version__ = "0.1.0"
