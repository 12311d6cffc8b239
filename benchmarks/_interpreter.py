"""Lets Triton's interpreter count in loops with every NumPy.

Up to Triton 3.6, a loop's bound is made from an array of one number by `int`, which NumPy 2.4 refuses.
"""


def mend() -> None:
    """Call once, before the first kernel is interpreted."""
    from triton.runtime import interpreter

    honest = interpreter._patch_lang_tensor

    def patch(tensor: type, *scope: object) -> None:
        honest(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
