"""All that is native: what stands between the kernel and Python, and the copying of clusters.

Imports no other folder; README.md says which file does what and which thread may touch what.
"""
