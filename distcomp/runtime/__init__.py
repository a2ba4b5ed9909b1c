"""How is an exchange driven, from its first request to what is kept of it?"""
