"""Where Records come from: folders, path lists and manifests."""
