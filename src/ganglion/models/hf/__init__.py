"""Decoders without a native family: modules of the transformers library (extra `hf`) over our pages."""
