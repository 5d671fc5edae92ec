"""Text: tokenizers, chat templates, normalisation and zh/en segmentation."""
