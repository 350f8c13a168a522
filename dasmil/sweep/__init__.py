"""Configs × seeds: runs of ``fit`` and ``test``, and the table of their test figures.

Nothing here imports torch: the runs are processes of their own.
"""
