"""Peers: scripts that other engines' environments run (`make peers`). They import nothing of ours.

Each loads one model, prints one line of JSON, then answers each line on its standard input with one.
"""
