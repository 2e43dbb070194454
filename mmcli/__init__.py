"""mmcli: batch work with multimodal transformer models from the command line."""

__version__ = "0.1.0"
