"""Many runs: ``sweep`` fits and tests them, ``compare`` puts tested runs side by side."""
