"""Watching what runs: points_of of a process and of this machine, frames that say what is in memory, and three ways to see them."""
