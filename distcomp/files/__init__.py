"""What does a model weigh at rest?"""
