"""The options of the commands: frozen dataclasses, documented once."""

from __future__ import annotations

from dataclasses import dataclass, field

from fasp_lightning.checkpoints.devices import require_dtype
from fasp_lightning.checkpoints.forms import require_form
from fasp_lightning.errors import FaspError
from fasp_lightning.pruning.config import PruningConfig
from fasp_lightning.pruning.latency.serving import Serving, require_speedup
from fasp_lightning.text.config import TextConfig

EVALUATED_SEQUENCES = 16

SEEDS = range(-(2**63), 2**64)
"""What a torch generator takes."""


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Attributes:
        name_or_path: A hub id, a folder, a .gguf file, or package:NAME for the GGUF file inside an installed
            Python package.
        tokenizer: Where the tokenizer comes from, if it is not the model's own.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run code that comes with the model.
        attn_implementation: "eager", "sdpa" and the like; by default what transformers chooses.
    """

    name_or_path: str
    tokenizer: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None


def default_evaluation() -> list[TextConfig]:
    """Both built-in corpora, small samples of what calibration never sees."""
    return [
        TextConfig(source=source, split="test", sequences=EVALUATED_SEQUENCES)
        for source in ("builtin:topics", "builtin:docstrings")
    ]


@dataclass(frozen=True)
class PruneJob:
    """Prune a causal language model with FASP, measure it before and after, and save it.

    Attributes:
        model: Which model.
        pruning: How to prune it.
        calibration: The text on which columns are scored and weights restored; not read where pruning.own_text.share
            is 1.
        calibration_mix: More such texts, each token counting by the text's token_weight; a list such as
            '[{source: builtin:docstrings, token_weight: 0.5}]'. Text of one kind alone makes a model worse on others.
        evaluation: The texts on which perplexity is measured before and after; a list such as
            '[{source: builtin:topics, split: test}]', which replaces the default, or '[]' for none.
        other_text: Source of one more such text, of another kind than the calibration text: what least squares gain
            on the one, they may lose on the other.
        compare_unrestored: Measure the same columns without the least squares too, to warn where they do harm; takes
            one more loading of the model, and one more evaluation.
        output_dir: Folder to save to; null saves nothing.
        form: "auto" is what stock transformers can load; "stock", "compact" (small, needs fasp_lightning) or
            "zero_filled" (original shapes where stock code wants them).
        overwrite: Replace a pruned model in output_dir.
        verify: Load what was saved again and compare the logits.
        stream: Read a block of the model at a time, prune it, and write it, so that the model may be larger than the
            memory; the same command goes on where it was stopped. null is true where the weights would take more than
            half of the free memory. Own text is then taken from its cache or left out, and the model is not measured
            without the least squares.
        push_to_hub: Id of a repository on the hub, such as me/model, that the saved folder is uploaded to; needs a
            token (hf auth login, or HF_TOKEN).
        private: Whether that repository is made private, if it is not there; null is the user's default on the hub.
        dtype: "auto" (the checkpoint's, on a CPU only if it is not slower than float32), "float32",
            "bfloat16" or "float16"; in which the model computes.
        save_dtype: In which it is saved: "auto" (the checkpoint's; dtype where that is narrower, and of a GGUF file,
            which has none), or one of the others.
        device: "auto", "cpu", "cuda" or "cuda:N".
        seed: Seed of the drawing of calibration sequences, instead of each text's own.
        prompt: Print how the model continues this text, before and after.
        new_tokens: Length of that continuation.
        speedup: Prune as far as makes the model so many times faster here, such as 1.3: blocks of a few widths are
            timed, and with fasp prune the outcome too. It takes the place of pruning.sparsity, and is refused beside
            one that is not the default; the default itself is not looked at, whether it is written out or not.
        serving: Lengths and phase that are to be faster, for speedup.
    """

    model: ModelConfig
    pruning: PruningConfig = field(default_factory=PruningConfig)
    calibration: TextConfig = field(default_factory=TextConfig)
    calibration_mix: list[TextConfig] = field(default_factory=list)
    evaluation: list[TextConfig] = field(default_factory=default_evaluation)
    other_text: str | None = None
    compare_unrestored: bool = True
    output_dir: str | None = "outputs/pruned"
    form: str = "auto"
    overwrite: bool = False
    verify: bool = True
    stream: bool | None = None
    push_to_hub: str | None = None
    private: bool | None = None
    dtype: str = "auto"
    save_dtype: str = "auto"
    device: str = "auto"
    seed: int | None = None
    prompt: str | None = None
    new_tokens: int = 40
    speedup: float | None = None
    serving: Serving = field(default_factory=Serving)

    def __post_init__(self) -> None:
        if self.other_text is not None:
            self.evaluated()  # refuses an unknown source
        if self.calibration_mix and not self.calibrated():
            raise FaspError(
                "calibration_mix must be empty where pruning.own_text.share is 1, got "
                f"{len(self.calibration_mix)} texts that would not be read; lower the share"
            )
        if self.seed is not None and self.seed not in SEEDS:
            raise FaspError(f"seed must be from {SEEDS[0]} to {SEEDS[-1]}, got {self.seed}")
        if self.push_to_hub is not None and self.output_dir is None:
            raise FaspError(f"output_dir must be a folder for push_to_hub={self.push_to_hub!r}, got null; name one")
        require_form(self.form)
        require_dtype(self.dtype)
        require_dtype(self.save_dtype, "save_dtype")
        if self.new_tokens < 1:
            raise FaspError(f"new_tokens must be at least 1, got {self.new_tokens}")
        if self.speedup is not None:
            self._check_speedup(self.speedup)

    def _check_speedup(self, speedup: float) -> None:
        require_speedup(speedup)
        if self.pruning.sparsity != PruningConfig.sparsity:
            raise FaspError(
                f"pruning.sparsity must be left out where speedup is given, got {self.pruning.sparsity} and {speedup}; "
                "the speed-up decides how far the model is pruned"
            )
        if self.prompt is not None and self.prompt.isdigit():
            raise FaspError(
                f"prompt must be the text of a prompt, got {self.prompt!r}; its length for speedup is serving.prompt"
            )

    def calibrated(self) -> list[TextConfig]:
        """The texts to calibrate on beside own text: none if that is all."""
        own = self.pruning.own_text
        return [] if own is not None and own.share == 1 else [self.calibration, *self.calibration_mix]

    def evaluated(self) -> list[TextConfig]:
        """The texts of ``evaluation``, and last the one that ``other_text`` names, in the size of the first of them."""
        if self.other_text is None:
            return self.evaluation
        like = (self.evaluation or default_evaluation())[0]
        other = TextConfig(self.other_text, seq_len=like.seq_len, sequences=like.sequences, batch_size=like.batch_size)
        return [*self.evaluation, other]

    @property
    def compares(self) -> bool:
        """Whether the model is measured without restoration too."""
        return self.compare_unrestored and self.pruning.restoration != "none" and bool(self.evaluated())


@dataclass(frozen=True)
class PlanJob(PruneJob):
    """Show what a pruning would give, from the model's config alone.

    Attributes:
        tensor_parallel: Number of ranks that will serve the model: says whether each FFN width divides among them.
        prove: Try on a tiny random twin of the model what has to hold of its family's row, which takes seconds; of a
            family without a row that is done anyway.
    """

    tensor_parallel: int = 1
    prove: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tensor_parallel < 1:
            raise FaspError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Tasks that a model is measured by.

    Attributes:
        tasks: Tasks of lm-evaluation-harness, or folders with questions of your own (*.jsonl), separated by commas;
            needs the extra: pip install 'fasp-lightning[eval]'. A line of such a file is {"context": str, "choices":
            [str, …], "label": int} or {"contexts": [str, …], "continuation": str, "label": int}.
        task_folder: Folder with task definitions of your own, in the harness' YAML.
        task_limit: Examples of each task; null takes all.
        task_batch_size: Requests in a batch.
    """

    tasks: str | None = None
    task_folder: str | None = None
    task_limit: int | None = None
    task_batch_size: int = 32

    def require_tasks(self) -> None:
        """Refuse numbers that cannot be.

        Raises:
            FaspError: If ``task_limit`` or ``task_batch_size`` is less than 1.
        """
        for name in ("task_limit", "task_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise FaspError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class EvaluateJob(TaskOptions):
    """Measure the perplexity of a model, pruned or not, and run tasks of the evaluation harness.

    Answers to tasks are kept in the report of a pruned folder too, where fasp report and model cards find them.

    Attributes:
        model: Which model.
        evaluation: The texts on which perplexity is measured; a list such as
            '[{source: builtin:topics, split: test}]', which replaces the default, or '[]' for none.
        dtype: As for fasp prune.
        device: "auto", "cpu", "cuda" or "cuda:N".
        output_file: JSON file for the figures, and for the answers to the tasks' questions.
        against: The output_file of another model that was measured by the same tasks: shows the differences, with their
            standard errors question by question.
    """

    model: ModelConfig
    evaluation: list[TextConfig] = field(default_factory=default_evaluation)
    dtype: str = "auto"
    device: str = "auto"
    output_file: str | None = None
    against: str | None = None

    def __post_init__(self) -> None:
        require_dtype(self.dtype)
        if not self.evaluation and not self.tasks:
            raise FaspError("evaluation must name a text where there are no tasks, got an empty list")
        if self.against is not None and not self.tasks:
            raise FaspError(f"against must be left out where there are no tasks, got {self.against!r}")
        self.require_tasks()
