"""Talking to what was made: in a terminal, on a local page, or through an OpenAI-compatible API."""
