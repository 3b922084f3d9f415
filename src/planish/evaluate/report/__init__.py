"""Charts and pages from measured results."""
