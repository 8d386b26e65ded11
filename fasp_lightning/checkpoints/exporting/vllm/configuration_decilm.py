"""Config of a model whose blocks have FFN widths of their own, as vLLM's DeciLMForCausalLM reads it."""

from typing import Any

from transformers import LlamaConfig


class Part(dict):
    """A mapping whose entries are attributes, too."""

    def __getattr__(self, name: str) -> Any:
        """The entry of that name."""
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Part(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """Of a LLaMA, with ``block_configs``, one for each block."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = None, **fields: Any) -> None:
        super().__init__(**fields)
        self.block_configs = [Part(block) for block in block_configs or ()]
