"""What an objective returns, made uniform, and its sums over a logging window."""
