"""How any program finds a mount, talks to its daemon and works on its files.

Knows /proc, the control socket's words and nothing of the daemon's insides; imports
system calls of storage, no other folder.
"""
