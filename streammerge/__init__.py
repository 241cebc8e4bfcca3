"""streammerge keeps one merged model up to date by folding in every new fine-tune of its base."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("streammerge")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"
