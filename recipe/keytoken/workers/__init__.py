"""What runs inside the worker processes: the attribution passes and the workers that own them."""
