"""Models on disk: reading any folder, writing a compressed one."""
