"""How does a method meet my model and optimizer, and leave again?"""
