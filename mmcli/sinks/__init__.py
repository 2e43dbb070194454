"""Where Results go: the commit protocol, and one file per output format."""
