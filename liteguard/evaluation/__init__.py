"""What a model gives on held-out rows, as numbers with intervals, a table and a report."""
