"""When things happen: one callback a file, the file named after it."""
