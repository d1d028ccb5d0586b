"""Studies: methods by seeds on variants of the demo world, run through the pure core in one process each."""
