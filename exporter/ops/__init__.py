"""The custom operators, one folder each."""
