"""Benchmark of passes that share a prompt; the command is prefix.py."""
