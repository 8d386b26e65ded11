"""Own text is what the model's distribution and the draws make it, whatever samples it, and shares as asked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_model
from tiny_pruning import BOTH, calibration, leftovers
from torch import Tensor, nn

from fasp_lightning import FASPPruner
from fasp_lightning.pruning.config import OwnTextConfig, with_user_cache
from fasp_lightning.pruning.own_text import generation
from fasp_lightning.pruning.own_text.generation import choose, first_tokens
from fasp_lightning.pruning.own_text.writing import calibration_starts, own_text
from fasp_lightning.training.modeling.lora import LoRAConfig, attach_lora

CONFIG = OwnTextConfig(tokens=5 * 20, seq_len=20)


def sampled(model: Any, config: OwnTextConfig = CONFIG) -> Tensor:
    """All of the text, (sequences, seq_len)."""
    return torch.cat(own_text(model, config))


@torch.no_grad()
def oracle(model: Any, config: OwnTextConfig = CONFIG) -> Tensor:
    """The same from whole forwards, without a cache: as many tokens as the distribution up to which is not above u."""
    draws = torch.rand(config.sequences, config.seq_len - 1, generator=torch.Generator().manual_seed(config.seed))
    rows = []
    for row in draws:
        ids = [1]  # beginning of text
        for draw in row:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(((logits / config.temperature).softmax(-1).cumsum(-1) <= draw).sum()))
        rows.append(ids)
    return torch.tensor(rows)


def shortened(model: Any) -> Any:
    FASPPruner(BOTH).prune(model, calibration())
    return model


@torch.no_grad()
def adapted(model: Any) -> Any:
    attach_lora(model, LoRAConfig(rank=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_()
    return model.eval()


def test_sampling_with_a_cache_equals_whole_forwards(tiny: Any) -> None:
    found = sampled(tiny)
    assert torch.equal(found, oracle(tiny))
    assert found.dtype == torch.int64


@pytest.mark.parametrize("change", [shortened, adapted])
def test_pruned_and_adapted_models_write_too(change: Any) -> None:
    model = change(tiny_model("llama-gqa"))
    found = sampled(model)
    assert torch.equal(found, oracle(model))
    assert not torch.equal(found, sampled(tiny_model("llama-gqa")))


def test_an_end_of_text_goes_on() -> None:
    model, config = tiny_model("opt"), OwnTextConfig(tokens=400, seq_len=20, seed=1)
    found = sampled(model, config)
    ends = (found[:, :-1] == model.config.eos_token_id).nonzero()
    assert len(ends)
    assert torch.equal(found, oracle(model, config))


def test_temperature_divides_the_logits() -> None:
    model, cold = tiny_model("opt"), replace(CONFIG, temperature=0.25)
    found = sampled(model, cold)
    assert torch.equal(found, oracle(model, cold))
    assert not torch.equal(found, sampled(model))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_chosen_as_often_as_they_are_likely(temperature: float) -> None:
    logits, draws = 3 * torch.randn(11), (torch.arange(2000) + 0.5) / 2000
    chosen, finite = choose(logits.expand(2000, 11), draws, temperature)
    expected = 2000 * (logits / temperature).softmax(-1)
    assert (torch.bincount(chosen, minlength=11) - expected).abs().max() <= 1
    assert finite


@pytest.mark.parametrize("temperature", [1e-30, 1.0])
@pytest.mark.parametrize("draw", [0.0, 1 - 2.0**-24])
def test_a_token_without_probability_is_never_chosen(draw: float, temperature: float) -> None:
    logits = torch.tensor([[-torch.inf, -torch.inf, 2.0, -torch.inf, 2.0, -torch.inf]])
    chosen, finite = choose(logits, torch.tensor([draw]), temperature)
    assert int(chosen) == (4 if draw else 2)
    assert finite


def test_unlikely_tokens_are_told_apart() -> None:
    """One of weight 1, and 64 of 1.1 · 2⁻²⁶: float32 tells no sums closer than 2⁻²³ apart."""
    logits = torch.tensor([[1.0] + 64 * [1.1 * 2.0**-26]]).log()
    chosen, _ = choose(logits, torch.tensor([1 - 2.0**-24]), 1.0)
    assert int(chosen) == 61  # 64 · 1.1 − 4 = 66.4 is above 60 · 1.1, and not above 61 · 1.1


@pytest.mark.parametrize(
    ("name", "value", "at_once"),
    [
        ("SEQUENCES", 1, {1}),
        ("SEQUENCES", 4, {3, 2}),  # not 4 and 1
        ("CACHE_BYTES", 1, {1}),
        ("CACHE_BYTES", 2 * 20 * 2 * 2 * 2 * 8 * 4, {2, 1}),  # two times 20 tokens, in 2 blocks, of 2 heads
    ],
)
def test_batching_changes_nothing(name: str, value: int, at_once: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama-gqa")
    whole = sampled(model)
    sizes: set[int] = set()
    monkeypatch.setattr(generation, name, value)
    model.lm_head.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
    assert torch.equal(sampled(model), whole)
    assert sizes == at_once


def test_batches_hold_all_sequences() -> None:
    batches = own_text(tiny_model("opt"), OwnTextConfig(tokens=1110, seq_len=10))
    assert [tuple(batch.shape) for batch in batches] == [(102, 10), (9, 10)]


def test_seed_decides_and_nothing_else() -> None:
    model = tiny_model("opt")
    first = sampled(model)
    torch.manual_seed(123)
    assert torch.equal(sampled(model), first)
    assert not torch.equal(sampled(model, replace(CONFIG, seed=1)), first)
    assert torch.equal(sampled(model, replace(CONFIG, share=1.0)), first)


def test_sampling_leaves_everything_as_it_was() -> None:
    model, expected = tiny_model("gpt2").train(), sampled(tiny_model("gpt2"))
    model.transformer.h[0].eval()
    model.config.use_cache = False
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    before = model.config.to_dict(), model.generation_config.to_dict(), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    assert torch.equal(sampled(model), expected)  # without dropout
    assert before == (model.config.to_dict(), model.generation_config.to_dict(), [m.training for m in model.modules()])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled()
    assert leftovers(model) == []


@pytest.mark.parametrize(
    ("generation", "config", "first"),
    [
        ({"bos_token_id": 7}, {"bos_token_id": 1}, 7),
        ({"bos_token_id": None}, {"bos_token_id": 1}, 1),
        ({"bos_token_id": None}, {"bos_token_id": None}, 2),
        ({"bos_token_id": VOCAB}, {"bos_token_id": 50256}, 2),  # a config's default, beyond this vocabulary
        ({"bos_token_id": None, "eos_token_id": [5, 6]}, {"bos_token_id": None}, 5),
        (dict.fromkeys(("bos_token_id", "eos_token_id")), dict.fromkeys(("bos_token_id", "eos_token_id")), 0),
    ],
)
def test_first_token_begins_a_text(generation: dict[str, Any], config: dict[str, Any], first: int) -> None:
    model = tiny_model("llama")
    for source, values in ((model.generation_config, generation), (model.config, config)):
        for name, value in values.items():
            setattr(source, name, value)
    assert sampled(model)[:, 0].tolist() == [first] * 5


def test_text_starts_like_calibration_text() -> None:
    """With the first token of any sequence, padding aside; in which order they came does not matter."""
    ids = torch.tensor([[11, 12, 13], [21, 22, 23], [31, 32, 33], [41, 42, 43]])
    mask = torch.tensor([[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 1]])
    starts = calibration_starts([{"input_ids": ids, "attention_mask": mask}, torch.tensor([[11, 7]])])
    assert starts is not None
    assert starts.tolist() == [11, 11, 22, 43]
    assert calibration_starts([{"input_ids": ids, "attention_mask": 0 * mask}]) is None
    model, many = tiny_model("llama"), OwnTextConfig(tokens=4000, seq_len=4)
    first = torch.cat(own_text(model, many, starts=starts))[:, 0]
    assert (first == 11).float().mean() == pytest.approx(0.5, abs=0.06)
    assert set(first.tolist()) == {11, 22, 43}


def test_a_start_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"in \[0, {VOCAB}\), the model's vocabulary, got {VOCAB}"):
        own_text(tiny_model("opt"), CONFIG, starts=torch.tensor([1, VOCAB]))


def test_any_token_is_first_where_no_text_begins() -> None:
    model = tiny_model("llama")
    for source in (model.generation_config, model.config):
        source.bos_token_id = source.eos_token_id = source.pad_token_id = None
    found = [first_tokens(model, 500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert len(found[0].unique()) > VOCAB / 2
    assert int(found[0].max()) < VOCAB
    assert torch.equal(sampled(model)[:, 0], found[0][:5])


@pytest.mark.parametrize("family", ["llama", "bloom"])  # Bloom knows no longest sequence
def test_sequences_end_with_the_positions(family: str) -> None:
    model, config = tiny_model(family), OwnTextConfig(tokens=65, seq_len=65)
    if family == "bloom":
        model.config.__dict__.pop("max_position_embeddings", None)
        assert sampled(model, config).shape == (1, 65)
        return
    assert torch.equal(sampled(model, config), sampled(model, OwnTextConfig(tokens=65, seq_len=64)))


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named_with_the_cure(value: float) -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    message = r"logits must be finite.*layers\.1\.mlp\.up_proj\.weight is not; check the checkpoint, or run .* float32"
    with pytest.raises(ValueError, match=message):
        own_text(model, CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1, "tokens": 5}, r"own_text\.seq_len must be 2 or more, got 1"),
        ({"tokens": 127}, r"own_text\.tokens must be at least own_text\.seq_len, 128, got 127"),
        ({"share": 0}, r"own_text\.share must be in \(0, 1\], got 0; set own_text to null"),
        ({"share": 1.1}, r"share must be in \(0, 1\], got 1\.1"),
        ({"share": float("nan")}, "share must be in .*, got nan"),
        ({"temperature": 0}, r"own_text\.temperature must be positive and finite, got 0"),
        ({"temperature": float("inf")}, "got inf"),
        ({"cache_dir": ""}, r"own_text\.cache_dir must be a folder, 'auto' or null, got ''"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OwnTextConfig(**options)


@pytest.mark.parametrize("set_", [True, False], ids=["XDG", "home"])
def test_commands_have_a_folder_in_the_users_cache(set_: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if set_:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    cache = tmp_path / ("xdg" if set_ else ".cache")
    found = with_user_cache(CONFIG).cache_dir
    assert Path(str(found)).expanduser() == cache / "fasp_lightning" / "own_text"
    assert set_ or str(tmp_path) not in str(found)  # settings are saved along, and name no home
    for mine in (replace(CONFIG, cache_dir="here"), replace(CONFIG, cache_dir=None)):
        assert with_user_cache(mine) == mine


@pytest.mark.cuda
@pytest.mark.parametrize("deterministic", [False, True])
def test_model_on_the_accelerator_writes_the_same(deterministic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    expected = sampled(tiny_model("llama"))
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert torch.equal(sampled(tiny_model("llama").cuda()), expected)
    finally:
        torch.use_deterministic_algorithms(False)
