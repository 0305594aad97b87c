"""The comparison systems of Tables 1 and 2 as faithful miniatures: one file each, one interface.

`system.py` says what a system is; `style.py` and `unets.py` are the blocks that several share.
"""
