"""Many processes on one folder: who works on which slide, and what has become of each."""
