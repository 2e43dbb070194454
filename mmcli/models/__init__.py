"""Model directory or hub id -> plan -> processor and runner; one file per family."""
