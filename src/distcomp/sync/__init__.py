"""When, and over which tensors, do workers agree?"""
