"""The analyses of `isthmus verify --analysis`, one a file; see `calibration.analysis`."""
