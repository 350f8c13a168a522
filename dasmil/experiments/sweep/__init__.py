"""Configs × folds × seeds: the road to the bags, runs of ``fit`` and ``test``, and their table.

Nothing here imports torch: every step is a process of its own.
"""
