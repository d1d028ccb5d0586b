"""What attribution costs, by whole runs of the demo side by side: ``keytoken bench``."""
