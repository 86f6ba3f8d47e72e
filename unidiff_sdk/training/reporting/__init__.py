"""Run logs and reports."""
