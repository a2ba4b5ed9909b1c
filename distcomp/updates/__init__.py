"""How do new weights reach those who run the model? Lossless updates, from trainer to inference."""

from distcomp.files.coding import CorruptFile
from distcomp.updates.apply import WrongBase, apply, read_key_frame
from distcomp.updates.directory import UpdateDirectory
from distcomp.updates.encode import encode
from distcomp.updates.fingerprints import state_fingerprint
from distcomp.updates.group import publish_to_group, receive_from_group
from distcomp.updates.safetensors import save_safetensors
from distcomp.updates.stream import MissingUpdate, Publication, Publisher, Receiver, floating_as
from distcomp.updates.update import Update, merge_parts, read_update

__all__ = [
    "CorruptFile",
    "MissingUpdate",
    "Publication",
    "Publisher",
    "Receiver",
    "Update",
    "UpdateDirectory",
    "WrongBase",
    "apply",
    "encode",
    "floating_as",
    "merge_parts",
    "publish_to_group",
    "read_key_frame",
    "read_update",
    "receive_from_group",
    "save_safetensors",
    "state_fingerprint",
]
