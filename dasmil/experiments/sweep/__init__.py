"""Configs × folds × seeds: the steps to the bags, runs of ``fit`` and ``test``, and their table.

Nothing here imports torch: every step runs in its own process.
"""
