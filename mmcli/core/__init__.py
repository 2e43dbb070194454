"""Core types, errors and registry tables: imports nothing heavy, and no other room."""
