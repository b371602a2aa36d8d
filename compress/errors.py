"""What can go wrong in compression. Every message says what was asked, what was found and what to do."""

from __future__ import annotations


class CompressionError(ValueError):
    """A model cannot be compressed as asked, or a compressed file is not usable."""
