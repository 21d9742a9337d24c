"""Stage 0: from the sources of the YAML to clean, split and mixed rows."""
