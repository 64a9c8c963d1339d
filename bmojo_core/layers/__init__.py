"""The layers: fading memory, window, eidetic memory, and the block that joins them.

Modules map (b, l, d) to (b, l, d) and, when asked, return the state that the next stretch of tokens
begins with.
"""
