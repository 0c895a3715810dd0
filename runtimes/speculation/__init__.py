"""Drafts: who makes them, which of them stay, and how long they should be.
A round of drafts is in `rounds.py`.
"""
