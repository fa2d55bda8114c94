"""Parameters on disk: Hugging Face directories (hf, tensor_file), Orbax checkpoints (store, workdir)."""
