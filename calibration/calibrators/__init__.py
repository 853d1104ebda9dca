"""The calibrators, one a file."""
