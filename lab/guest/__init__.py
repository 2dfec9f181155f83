"""What runs inside laboratory guests, whoever hosts them: formats and checkers without I/O of their own."""
