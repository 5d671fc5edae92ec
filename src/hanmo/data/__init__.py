"""Data: from a user's files to validated, cleaned, split and tokenised datasets."""
