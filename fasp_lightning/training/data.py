"""Text for a Lightning run: packed sequences whose loaders resume in the middle of an epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from fasp_lightning.checkpoints.loading import load_tokenizer
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.inputs import ModelInputs
from fasp_lightning.staging import fingerprint
from fasp_lightning.text.config import OWN_TEXT, TextConfig, describe
from fasp_lightning.text.packed_cache import FORMAT, Tokenised, default_cache
from fasp_lightning.text.role_cache import RoleCache
from fasp_lightning.text.roles import ROLES, RoleTexts, as_texts
from fasp_lightning.text.shuffling import EvaluationSampler
from fasp_lightning.text.tokenizer import TokenizerTraining, trained_tokenizer
from fasp_lightning.training.loaders.build import TrainingOptions, cached_loader, stream_loader
from fasp_lightning.training.loaders.cached import PackedSequences, ResumableLoader
from fasp_lightning.training.loaders.streamed import StreamLoader
from fasp_lightning.training.loaders.written import write_own_text
from fasp_lightning.training.modeling.locate import causal_lms
from fasp_lightning.training.trainer.resuming import BatchProgress


class CausalLMDataModule(L.LightningDataModule):
    """Text for training, calibration, validation and testing of a causal language model.

    Documents are put end to end, tokenised once into a memory-mapped cache, and cut into sequences of ``seq_len``
    tokens. Roles that read the same text divide its documents among themselves; no document of 80 characters
    or more serves two roles, wherever it stands. A training run stopped at any batch goes on, resumed, with the
    very next one. Batches are {"input_ids", "labels"}, (batch, seq_len) int64; no label counts where it is −100.
    ``own_text`` is written by the run's model before anything is pruned, once; its sequences start like the
    calibration text that is read, else with any token. Each role has some of its own, but those without a text of
    their own none beside other training text.

    Args:
        tokenizer: The model's name, folder or GGUF file, a tokenizer of transformers, or settings by which one
            is trained on the training text.
        source: The text of all roles that have none of their own, as ``TextConfig.source``. None is training's,
            and failing that builtin:topics.
        train: Texts to train on.
        validation: Texts to validate on.
        calibration: Texts to prune by.
        test: Texts to test and predict on.
        seq_len: Tokens of a sequence.
        batch_size: Sequences of a batch of one process.
        sequences_per_epoch: Sequences of a training epoch, of all processes together; None takes as many as
            there are.
        streaming: Read the training text on the fly, without caching it, for text that is large. An epoch is
            then the next ``sequences_per_epoch``, which must be set, and texts without an ``epoch_weight`` count alike;
            validation and test are the first 1024 sequences, where their texts set no number.
        num_workers: Worker processes of a loader; 0 reads in the process itself.
        seed: Seed of the order of the training sequences, which depends on it and the epoch alone, and of the
            drawing of the sequences of texts that set a number of them and no seed.
        cache_dir: Folder for tokenised text; None is one beside the data sets that ``datasets`` caches. Text of the
            hub stays there as it was read first; remove the folder to read it anew.

    Raises:
        FaspError: If an argument is outside its range, or a text sets a seq_len or batch_size of its own, or a weight
            that means nothing in its role.

    Example::

        from fasp_lightning import CausalLMDataModule

        data = CausalLMDataModule(tokenizer, source=text_file, seq_len=16, batch_size=2, cache_dir=folder)
        data.prepare_data()
        data.setup("fit")
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape == batch["labels"].shape == (2, 16)
    """

    def __init__(
        self,
        tokenizer: str | TokenizerTraining | PreTrainedTokenizerBase | None = None,
        source: str | None = None,
        train: list[TextConfig] | None = None,
        validation: list[TextConfig] | None = None,
        calibration: list[TextConfig] | None = None,
        test: list[TextConfig] | None = None,
        seq_len: int = 512,
        batch_size: int = 8,
        sequences_per_epoch: int | None = None,
        streaming: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        given = {"train": train, "validation": validation, "calibration": calibration, "test": test}
        self.roles = RoleTexts.resolve(source, {role: as_texts(texts) for role, texts in given.items()})
        self.seq_len, self.batch_size, self.seed = seq_len, batch_size, seed
        self.sequences_per_epoch, self.streaming = sequences_per_epoch, streaming
        self.num_workers, self.cache_dir = num_workers, cache_dir
        self._given = tokenizer
        self._tokenizer = tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None
        self._cache: RoleCache | None = None
        self._loader: ResumableLoader | StreamLoader | None = None
        self._loader_state: dict[str, Any] | None = None
        self._loader_trainer: L.Trainer | None = None
        self._check()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded or trained the first time.

        Raises:
            FaspError: If none was given.
        """
        if self._tokenizer is None:
            if self._given is None:
                raise FaspError(
                    "tokenizer must be the name or folder of one, a TokenizerTraining or a tokenizer, got None; "
                    "it is commonly the model's name"
                )
            given = self._given
            self._tokenizer = (
                self._trained(given) if isinstance(given, TokenizerTraining) else load_tokenizer(str(given))
            )
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Embeddings that a model for this text needs; reads nothing where the tokenizer is trained on the spot."""
        return self._given.vocab_size if isinstance(self._given, TokenizerTraining) else len(self.tokenizer)

    def prepare_data(self) -> None:
        """Tokenise what the run needs, in one process, for all to load."""
        cache = self._texts()
        for role in self._needed():
            if role != "train" or not self.streaming:
                cache.ready(role)  # what can't be read is an error where it is asked for

    def setup(self, stage: str) -> None:
        """Load the training text, have own text written, and refuse what the model cannot take.

        Raises:
            FaspError: If the text cannot be read, sequences are longer than the model's learned positions, or a token
                that occurs in them has no embedding, or own text cannot be written. Streamed batches are looked at one
                by one.
        """
        inputs = self._model_inputs()
        if inputs is not None:
            inputs.check_length(self.seq_len, "the data module")
        write_own_text(self._texts(), self._needed(), self.trainer, self._model())
        if stage == "fit" and not self.streaming:
            self._read("train")
        if stage == "fit" and inputs is not None and self._texts().ready("validation"):
            self._read("validation")

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        """Batches to train on, in an order that depends on the seed and the epoch alone."""
        state, self._loader_state = self._loader_state, None
        before, self._loader = self._loader, self._training_loader()
        if state is None and before is not None and self._loader_trainer is self.trainer is not None:
            carried = before.state_dict()  # the loader is made anew within one training, which goes on
            state = carried if carried["order"] == self._loader.order else None
        if state is not None:
            self._loader.load_state_dict(state)
        self._loader_trainer = self.trainer
        return self._loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches to validate on, each sequence on one process."""
        return self._evaluation_loader("validation")

    def test_dataloader(self) -> DataLoader[Any]:
        """Batches to test on, each sequence on one process."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test text once more; Lightning deals it to processes, keeping track of the indices."""
        return self._plain_loader(self._sequences("test"))

    def calibration_dataloader(self) -> DataLoader[Any]:
        """All of the calibration text, in order, on every process."""
        return self._plain_loader(self._sequences("calibration"))

    def state_dict(self) -> dict[str, Any]:
        """The place in the training text. Lightning loads a loader's own state only in the middle of an epoch."""
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the place until there is a loader of training text."""
        if self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING:
            self._loader_state = state_dict.get("train")

    def _check(self) -> None:
        """Refuse arguments outside their range."""
        if self.seq_len < 2:
            raise FaspError(f"seq_len must be 2 or more, got {self.seq_len}: one token predicts nothing")
        for name, least in (("batch_size", 1), ("num_workers", 0), ("sequences_per_epoch", self.batch_size)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise FaspError(f"{name} must be {least} or more, got {value}")
        self._check_own_sizes()
        if not self.streaming:
            return
        if self.sequences_per_epoch is None:
            raise FaspError("sequences_per_epoch must be set with streaming, got None: a stream has no end")
        if any(text.kind == "own" for text in self.roles.texts["train"]):
            raise FaspError(f"streaming must be false with the training text {OWN_TEXT}, which is cached")
        cut = [text.source for text in self.roles.texts["train"] if text.number is not None]
        if cut:
            raise FaspError(
                f"sequences must be None for a training text that is streamed, got a number for {', '.join(cut)}; "
                "set sequences_per_epoch, and epoch_weight where there are several texts"
            )

    def _check_own_sizes(self) -> None:
        """Refuse texts that want other sequences or batches than the rest: a loader has those of one size."""
        for role, texts in self.roles.texts.items():
            for text in texts:
                for name in ("seq_len", "batch_size"):
                    own, common = getattr(text, name), getattr(self, name)
                    if own not in (None, common):
                        raise FaspError(
                            f"{name} of the {role} text {describe(text)!r} must be that of the data module, {common}, "
                            f"got {own}; leave it out of the text, or set {name} of the data module"
                        )

    def _folder(self) -> Path:
        return default_cache() if self.cache_dir is None else Path(self.cache_dir).expanduser()

    def _trained(self, training: TokenizerTraining) -> Any:
        """Train the tokenizer on the training text, or load the one trained before."""
        texts = [index for index, text in enumerate(self.roles.texts["train"]) if text.kind != "own"]
        if not texts:
            raise FaspError(f"tokenizer must be that of the model to write {OWN_TEXT}, got none but settings")
        identities = [self.roles.identity("train", index) for index in texts]
        key = fingerprint(FORMAT, identities, vars(training))
        documents = (document for index in texts for document in self.roles.documents("train", index))
        return trained_tokenizer(self._folder() / f"tokenizer-{key}", documents, training)

    def _texts(self) -> RoleCache:
        if self._cache is None:
            short = ("calibration", "validation", "test") if self.streaming else ("calibration",)
            self._cache = RoleCache(self.roles, self.tokenizer, self.seq_len, self.seed, self._folder(), short)
        return self._cache

    def _needed(self) -> tuple[str, ...]:
        """The roles whose text the run reads, or may read."""
        function = None if self.trainer is None else self.trainer.state.fn
        evaluated = {TrainerFn.VALIDATING: "validation", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "test"}
        return (evaluated[function],) if function in evaluated else ROLES

    def _model(self) -> Any:
        """The run's model; ``None`` outside a run, or where its module does not hold one model."""
        module = getattr(self.trainer, "lightning_module", None)
        models = [] if module is None else list(causal_lms(module).values())
        return models[0] if len(models) == 1 else None

    def _model_inputs(self) -> ModelInputs | None:
        """What the run's model takes, if there is one."""
        model = self._model()
        return None if model is None else ModelInputs(model)

    def _read(self, role: str) -> list[Tokenised]:
        """The texts of a role, whose tokens the model has embeddings for."""
        found, inputs = self._texts().get(role), self._model_inputs()
        if inputs is not None:
            for text, config in zip(found, self.roles.texts[role], strict=True):
                text.check_vocabulary(inputs.vocabulary, describe(config))
        return found

    def _sequences(self, role: str) -> PackedSequences:
        return PackedSequences([text.sequences for text in self._read(role)])

    def _place(self) -> tuple[int, int]:
        """Rank and number of the processes that get different data."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (0, 1) if kwargs is None else (kwargs["rank"], kwargs["num_replicas"])

    def _training_loader(self) -> ResumableLoader | StreamLoader:
        progress = BatchProgress(lambda: self.trainer)
        sizes = self.batch_size, self.seed, self.sequences_per_epoch, self.num_workers
        inputs = self._model_inputs()
        options = TrainingOptions(*sizes, *self._place(), progress, None if inputs is None else inputs.vocabulary)
        return (stream_loader if self.streaming else cached_loader)(self._texts(), options)

    def _evaluation_loader(self, role: str) -> DataLoader[Any]:
        data = self._sequences(role)
        return self._plain_loader(data, sampler=EvaluationSampler(len(data), *self._place()))

    def _plain_loader(self, data: PackedSequences, **options: Any) -> DataLoader[Any]:
        return DataLoader(
            data,
            batch_size=self.batch_size,  # by name: Lightning builds the loader anew to predict
            num_workers=self.num_workers,
            generator=torch.Generator(),
            **options,
        )
