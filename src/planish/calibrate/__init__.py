"""From text to statistics, kept for the next run."""
