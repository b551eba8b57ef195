"""One file per subcommand of `llama2`; only `cli` imports them."""
