"""Handing what was proven to others: files, card and proof for a model hub, and the upload."""
