"""Attention whose heads can be removed: equal replacements of modules that tie their heads to their width.

`replace.py` finds what can be replaced and puts it in place; the other files hold one kind of attention each. In all of
them q, k, v and proj are layers of their own, and how many heads there are is told by their shapes alone.
"""
