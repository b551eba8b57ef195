"""What pages of results are made of: blocks and their renderings, plots, statistics over seeds."""
