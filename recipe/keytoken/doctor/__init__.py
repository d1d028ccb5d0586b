"""Is this machine, and is this run, in order? One small function for each thing that can be wrong."""
