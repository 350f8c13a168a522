"""Compare tested runs: metrics with intervals, and paired tests against the first method."""
