"""Data, metrics and the accuracy report."""
