"""One mount put together: options, the control socket and its commands, the life of the daemon.

Knows every layer below; nothing but the command line imports it.
"""
