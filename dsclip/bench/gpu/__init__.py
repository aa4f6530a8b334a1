"""One run that measures all that needs a GPU: phases with deadlines, each in a process of its own, and one table."""
