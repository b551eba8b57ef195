"""What each number of key/value heads costs and buys: quality, speed and memory."""
