"""kdcli: compress encoder-size models from the shell."""

__version__ = "0.1.0"
