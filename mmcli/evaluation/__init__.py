"""Metrics of predictions against the truth, with bootstrap intervals."""
