"""Libraries speak only when something is wrong: their hints would run through our output."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def quiet_libraries() -> None:
    """Switch off the hints of transformers, off a terminal its bars too; show our own log on stderr."""
    plain = not sys.stderr.isatty()
    if plain:
        os.environ.setdefault("TQDM_DISABLE", "1")  # for bars that ask nobody; read when tqdm is imported
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if plain:
        transformers_logging.disable_progress_bar()
    logger = logging.getLogger("fasp_lightning")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def quiet_lightning() -> None:
    """Leave out Lightning's advertisements, and a warning about its own code that newer versions of torch give."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: " not in record.getMessage()


_ALL = torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensor operations: a second thread costs each some ms wherever the cores are busy."""
    with _threads(1):
        yield


@contextmanager
def all_threads() -> Iterator[None]:
    """As many threads as there were at the start: what is timed runs as it will be served."""
    with _threads(_ALL):
        yield


@contextmanager
def _threads(count: int) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
