"""``keytoken plan``: what a run would need and how long a step would take, from arithmetic alone."""
