"""streammerge keeps one merged model up to date by folding in every new fine-tune of its base."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    """Look the version up when it is asked for: that takes longer than a short command's own work."""
    if name != "__version__":
        raise AttributeError(name)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("streammerge")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"
