"""Who drives an exchange, round by round, and in which order?"""
