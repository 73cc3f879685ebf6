"""The kernel's side: what FUSE asks, and what it is answered.

pyfuse3 is imported here and nowhere else; errors of the engine become errnos here (errnos.py).
"""
