"""Execute notebooks: check their parameters, run them by papermill, many at once, and show their progress."""
