"""What to cut, and what the result will cost."""
