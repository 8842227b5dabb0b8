"""Run folders as an HTML page."""
