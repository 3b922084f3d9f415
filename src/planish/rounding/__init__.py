"""Storage types of weights, and rounding to them: knows tensors only, no models and no files."""
