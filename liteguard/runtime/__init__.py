"""A finished bundle, opened as a phone opens it."""
