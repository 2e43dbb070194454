"""Bytes -> decoded image, audio, video or text, and the worker pool that isolates it."""
