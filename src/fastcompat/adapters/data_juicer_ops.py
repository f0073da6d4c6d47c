"""The file for Data-Juicer's `--custom-operator-paths`, which registers the filters of `data_juicer`.

    dj-process --config recipe.yaml --custom-operator-paths "$(python -m fastcompat.adapters.data_juicer_ops)"

A file of its own: Data-Juicer gives a module the name of its file, and other processes could not import the filters
from there.
"""

from __future__ import annotations

from fastcompat.adapters.data_juicer import FastcompatLossFilter, FastcompatRewardFilter

__all__ = ["FastcompatLossFilter", "FastcompatRewardFilter"]

if __name__ == "__main__":
    print(__file__)
