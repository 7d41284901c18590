"""Pairs in tar shards: written, read by number, and read from front to back."""
