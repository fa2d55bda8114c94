"""Text in, batches out: tokenizers, chat templates, data sources, packing and loading."""
