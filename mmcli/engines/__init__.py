"""Who runs the work: the loop from Source to Sink."""
