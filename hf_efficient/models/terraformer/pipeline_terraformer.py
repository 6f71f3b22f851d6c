"""Summaries of documents of any length, as a pipeline of transformers, whose version 5 has none."""

from typing import Any

import torch
from transformers.pipelines.base import ChunkPipeline

from ...utils.text_pieces import source_limit, split_document, table_length


_DEFAULT_NEW_TOKENS = 128
_PREPROCESS, _POSTPROCESS = ("max_source_length",), ("separator", "clean_up_tokenization_spaces")


class TerraformerSummarizationPipeline(ChunkPipeline):
    """
    Summarise documents by an encoder-decoder. A document that is longer than the model reads at once is divided into
    pieces, as far as possible at ends of sentences, whose summaries are joined.

    Works with Terraformer and with any other model of [`~transformers.AutoModelForSeq2SeqLM`].

    Args:
        model (`PreTrainedModel`): an encoder-decoder.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        max_source_length (`int`, *optional*): tokens of a piece; by default the length of the model's table of
            positions or the tokenizer's limit, whichever is shorter. Also an argument of a call, as all below.
        separator (`str`, defaults to `" "`): between the summaries of pieces.
        batch_size (`int`, *optional*): pieces that go through the model together, of several documents too.
        kwargs: of `generate`, such as `max_new_tokens`, of each piece, or `num_beams`. Without a length here or in the
            model's generation config a summary has at most 128 tokens.

    Raises:
        ValueError: if the model is no encoder-decoder, or has no tokenizer, for a document without text, and for pieces
            of no token or of more than the model reads at once.

    Example:

    ```python
    >>> import hf_efficient  # registers the pipeline
    >>> from transformers import pipeline

    >>> summarize = pipeline("summarization", model="my-summarizer")
    >>> summarize("A long document. It goes on and on.")[0]["summary_text"]  # doctest: +SKIP
    ```
    """

    _load_tokenizer: Any = True
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, model: Any, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        if not getattr(self.model.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(self.model).__name__} is no encoder-decoder, and does not summarise this way.")
        if self.tokenizer is None:
            raise ValueError("Summaries need a tokenizer: give one as `tokenizer`.")

    def __call__(self, documents: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """
        Summarise.

        Args:
            documents (`str`, `list[str]`, or an iterator or a dataset of them): the texts.
            kwargs: see the class.

        Returns:
            `list[dict[str, str]]`: with `summary_text` for each, for one text too; of an iterator or a dataset an
                iterator of these.
        """
        found = super().__call__(documents, **kwargs)
        return [found] if isinstance(documents, str) else found

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        first, last = (
            {name: kwargs.pop(name) for name in names if name in kwargs} for names in (_PREPROCESS, _POSTPROCESS)
        )
        return first, {**kwargs.pop("generate_kwargs", {}), **kwargs}, last

    def preprocess(self, document: Any, max_source_length: int | None = None) -> Any:  # type: ignore[override]
        if not isinstance(document, str):
            raise ValueError(f"A document to summarise is a text, not {type(document).__name__}.")
        if not document.strip():
            raise ValueError("A document to summarise has no text: leave it out.")
        pieces = split_document(self.tokenizer, document, self._piece_length(max_source_length))
        for number, ids in enumerate(pieces, 1):
            row = torch.tensor([ids])
            yield {"is_last": number == len(pieces), "input_ids": row, "attention_mask": torch.ones_like(row)}

    def _piece_length(self, given: Any) -> int | None:
        """Tokens of a piece; `None` for no limit."""
        if given is None:
            return source_limit(self.model.config, self.tokenizer)
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise ValueError(
                f"max_source_length must be a number of tokens, from 1, not {given!r}: leave it out for as many as the "
                "model reads at once."
            )
        table = table_length(self.model.config)
        if table is not None and given > table:
            raise ValueError(
                f"max_source_length is {given}, but this model's table of positions (max_position_embeddings) has "
                f"{table}: lower it, or leave it out."
            )
        return given

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        is_last = model_inputs.pop("is_last")
        model: Any = self.model
        own = generate_kwargs.get("generation_config") or model.generation_config
        if (generate_kwargs.get("num_return_sequences") or own.num_return_sequences or 1) != 1:
            raise ValueError(
                "The summarization pipeline gives one summary a document: leave num_return_sequences at 1."
            )
        lengths = [generate_kwargs.get("max_length"), generate_kwargs.get("max_new_tokens")]
        # 20 is the default of older releases, where the config of a model does not say it
        if not any(lengths) and own.max_new_tokens is None and own.max_length in (None, 20):
            generate_kwargs["max_new_tokens"] = _DEFAULT_NEW_TOKENS
        return {"is_last": is_last, "output_ids": model.generate(**model_inputs, **generate_kwargs)}

    def postprocess(  # type: ignore[override]
        self, model_outputs: list[Any], separator: str = " ", clean_up_tokenization_spaces: bool = False
    ) -> dict[str, str]:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": clean_up_tokenization_spaces}
        tokenizer: Any = self.tokenizer
        summaries = [tokenizer.decode(output["output_ids"][0], **options).strip() for output in model_outputs]
        return {"summary_text": separator.join(filter(None, summaries))}


__all__ = ["TerraformerSummarizationPipeline"]
