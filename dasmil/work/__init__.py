"""Many processes on one folder: which slide each works on, and the state of every slide."""
