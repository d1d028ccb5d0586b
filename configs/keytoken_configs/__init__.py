"""Hydra configuration of KeyToken: ``train.yaml`` and its groups."""
