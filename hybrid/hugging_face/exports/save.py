"""save_pretrained of a model on a mesh: its slices written in place, with the names and files of transformers' own."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ... import compat
from ...checkpoint.together import on_every_rank, on_first_rank
from ...consistency import check_has_memory
from ...outputs import cannot_write
from ..export import Options, export_state, save_configs


def save_slices(model: nn.Module, target: str | os.PathLike[str], options: Mapping[str, Any], may_write: bool) -> bool:
    """Save a Hugging Face model as its save_pretrained does, each rank its slices; every rank calls it.

    Args:
        options: the arguments of save_pretrained, of which the size of files and the variant count.
        may_write: whether anything is written, as rank 0 says.

    Returns:
        Whether it is done. It is not where transformers writes other tensors than the model's; nothing is written then.
    """
    check_has_memory("save_pretrained", model)
    names = compat.names_when_saved(model, model.state_dict())
    if any(on_every_rank(lambda: names is None)):
        return False
    assert names is not None
    if not on_first_rank(lambda: may_write):
        return True
    folder = Path(target)

    def check() -> None:
        if os.path.lexists(folder) and not folder.is_dir():
            raise cannot_write(folder, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))

    on_first_rank(check)
    made = Options(max_shard_size=options.get("max_shard_size"), variant=options.get("variant"), into=True, names=names)
    export_state(model, folder, made, lambda place: save_configs(model, place))
    return True
