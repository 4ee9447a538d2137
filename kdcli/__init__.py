"""kdcli: compress encoder-size models from the shell, or from Python (``kdcli.distill(...)``, see docs/python.md)."""

import os as _os

__version__ = "0.1.0"

# Nothing is told to anybody. Libraries read these once, when they are loaded, so they are set before any of them is;
# they are set whatever the environment says, because the promise is kdcli's. onnxruntime (1.29 and later, outside
# Windows) would otherwise write an identifier into the user's cache and ask for a collector's address.
_os.environ.update(
    ORT_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_TELEMETRY="1",  # huggingface_hub, and what builds on it: transformers, datasets, hf_xet
    HF_XET_TELEMETRY_ENABLED="0",
    HF_UPDATE_DOWNLOAD_COUNTS="0",  # datasets
    DO_NOT_TRACK="1",
)

__all__ = ["__version__", "distill", "evaluate", "lowrank", "predict", "prune", "quantize"]


def __getattr__(name: str) -> object:
    """The function of a command; nothing of it is imported before."""
    if name in __all__:
        from kdcli import api

        return api.FUNCTIONS[name]
    raise AttributeError(f"module 'kdcli' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
