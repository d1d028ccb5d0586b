"""Losses, pure torch: group advantages and the token-weighted policy loss."""
