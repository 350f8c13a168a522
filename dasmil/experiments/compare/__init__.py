"""Finished runs side by side: figures with intervals, and paired tests against the first."""
