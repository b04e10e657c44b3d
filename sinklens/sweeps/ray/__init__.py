"""The engine ``ray``: the tasks of a sweep on several copies of the model, each in a process of its own."""
