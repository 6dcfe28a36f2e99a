"""What a file that is not what its name says is in truth, by its first bytes, and how to get the real one."""

from __future__ import annotations

from ..errors import shown

LOOKED_AT = 256
"""First bytes of a file that `mistaken` looks at."""

_AGAIN = "download it again (from a hub: by its /resolve/ link, logged in if the model is gated)"

_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes it", "load it with PyTorch and save its tensors with safetensors"),
    (b"\x80\x02\x8a\x0a", "a pickle, as torch.save writes it", "load it with PyTorch and save its tensors with safetensors"),
    (b"\x80\x02}", "a Python pickle", "load it where it was made and save its tensors with safetensors"),
    (b"\x80\x04\x95", "a Python pickle", "load it where it was made and save its tensors with safetensors"),
    (b"\x80\x05\x95", "a Python pickle", "load it where it was made and save its tensors with safetensors"),
    (b"GGUF", "a GGUF file", "give it a name that ends in .gguf"),
    (b"\x89HDF", "an HDF5 file", "load it with Keras and save its tensors with safetensors"),
    (b"\x93NUMPY", "a NumPy array", "save it with slidesparse_nb.save or safetensors"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive", "unpack it first"),
    (b"BZh", "a bzip2 archive", "unpack it first"),
    (b"\xfd7zXZ", "an xz archive", "unpack it first"),
    (b"7z\xbc\xaf", "a 7-Zip archive", "unpack it first"),
)
"""First bytes, what they tell, and the way out."""


def is_pointer(head: bytes) -> bool:
    """Whether a file that begins with `head` is a pointer of Git LFS or Git Xet, left where the file itself belongs."""
    return head.lstrip(b"\xef\xbb\xbf \r\n").startswith((b"version https://git-lfs.github.com/", b"# xet version"))


POINTER = (
    "is a pointer of Git LFS, not the file itself; run `git lfs install && git lfs pull` in its repository, or download it"
)


def mistaken(head: bytes, wanted: str) -> str:
    """What a file is that begins with `head` and is no `wanted`: a clause with the way out, or "" where nobody can tell.

    Args:
        head: its first LOOKED_AT bytes, or all of fewer.
        wanted: what it should be, such as ".safetensors file".
    """
    if is_pointer(head):
        return POINTER
    for magic, what, way in _MAGIC:
        if head.startswith(magic):
            return f"is {what}, no {wanted}; {way}"
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:  # of a longer text the last character may be cut
        text = head[: error.start].decode("utf-8") if error.start > LOOKED_AT - 4 else "\0"
    text = text.lstrip("\ufeff \r\n\t")
    start = text.lower()
    if start.startswith(("<!doctype", "<html", "<?xml", "<!--", "<head", "<error")):
        return f"is a web page ({shown(text[:60])}), no {wanted}; {_AGAIN}"
    if not text or not all(c.isprintable() or c in "\r\n\t" for c in text):
        return "is all zeros; " + _AGAIN if len(head) >= 16 and not any(head) else ""
    kind = "a JSON text" if text[0] in "{[" else "a text"
    return f"is {kind} ({shown(text[:60])}), no {wanted}; {_AGAIN}"
