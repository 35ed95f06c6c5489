"""Command lines: each module has a ``main(argv) -> int``."""
