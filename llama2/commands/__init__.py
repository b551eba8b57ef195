"""One file per subcommand of `llama2`; nothing imports them."""
