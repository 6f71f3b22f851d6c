"""Generation by models whose cache holds states."""

from typing import Any

from ..utils.cache_naming import CacheGenerationMixin


class StatefulGenerationMixin(CacheGenerationMixin):
    """
    `generate` for a model whose layers carry states from token to token.

    Stands before `GenerationMixin` among the bases of a model.
    """

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        # Before anything is drafted: transformers would leave the config with fewer layers after an error.
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                f"assistant_early_exit does not work with {type(self).__name__}, whose first layers have states and "
                "keys of their own: draft by a smaller model (assistant_model=...) or from the prompt "
                "(prompt_lookup_num_tokens=...)."
            )
        return super()._get_candidate_generator(generation_config, *args, **kwargs)  # type: ignore[misc]
