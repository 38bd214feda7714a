"""Text from a model over HTTP, in the form of OpenAI's interface: `sambalm serve`.

engine.py     read first: requests that are generated together, in a thread of its own
bodies.py     what clients send, checked
replies.py    what they get: whole answers, events, errors
app.py        the routes
command.py    the server's life, from its port to Ctrl-C
"""
