"""What do workers say to each other about models: rarely, with neighbours only, or both?"""
