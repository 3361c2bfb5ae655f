"""Pure tensor functions, a noun a file; each is usable alone."""
