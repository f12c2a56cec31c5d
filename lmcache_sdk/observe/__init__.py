"""Seeing it: logs and metrics."""
