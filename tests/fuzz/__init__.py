"""Mutated files of every kind that dasmil reads, given to the functions that handle one row.

``python tests/fuzz/run.py`` is the long form; ``tests/test_fuzz.py`` the short one.
"""
