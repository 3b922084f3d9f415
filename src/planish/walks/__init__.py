"""A walk over the blocks: one that cuts, one that rounds."""
