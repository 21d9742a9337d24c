"""Stages 1 to 3: what they share, from prepared rows to a saved adapter."""
