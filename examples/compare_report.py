def report(*a, **k):
    pass
