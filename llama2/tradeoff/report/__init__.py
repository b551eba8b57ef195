"""The page of a study: tables, plots, words."""
