"""Checkpoints in low precision: how released formats store a weight in several tensors, one file per format."""
