"""Building blocks of result pages: blocks and their renderings, plots, statistics over seeds."""
