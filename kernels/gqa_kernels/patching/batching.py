"""Transformers' continuous batching of a patched model.

`generate_batch` of a model calls its method `init_continuous_batching`. `patch` puts the function
below in its place, bound by `functools.partial`, so it is copied and pickled with its model.
"""

from typing import Any

from torch import nn


def holds(module: nn.Module) -> bool:
    """Whether a module is a model of Transformers that has continuous batching."""
    config = vars(module).get("config")
    decodes = config is not None and not getattr(config, "is_encoder_decoder", False)
    return decodes and hasattr(type(module), "init_continuous_batching")


def init_continuous_batching(model: nn.Module, *args: Any, **options: Any) -> Any:
    """Returns a manager that uses this package's attention; Transformers' own if another attention
    has been set since `patch`.

    Raises:
        RuntimeError: a Transformers whose continuous batching this package does not know.
    """
    from gqa_kernels.integrations.transformers import ATTENTION_NAME

    chosen = model.config.get_text_config()._attn_implementation
    if not chosen.startswith(ATTENTION_NAME):
        return type(model).init_continuous_batching(model, *args, **options)
    try:
        from gqa_kernels.integrations import transformers_paged
    except ImportError as error:
        import transformers

        raise RuntimeError(
            f"transformers: expected 5.20 or newer for continuous batching with {ATTENTION_NAME}; "
            f"got {transformers.__version__}"
        ) from error
    return transformers_paged.init_continuous_batching(model, *args, **options)
