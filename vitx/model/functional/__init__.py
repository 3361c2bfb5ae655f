"""Pure tensor functions, a noun per file; each is usable alone."""
