"""From a recipe to running processes: command line, preflight, Ray and local backends, progress display."""
