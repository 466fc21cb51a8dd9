//! A model as it lies on disk: GGUF files and Hugging Face directories.
