"""Stand-in."""


def load_pretrained(model, folder, *, dtype=None):
    import torch
    from safetensors.torch import load_file
    from torch.distributed.tensor import DTensor

    from fusemesh.hybrid.placed import _part_like

    model.to_empty(device="cpu")
    found = {}
    for file in sorted({t.file for t in folder.tensors.values()}):
        found.update(load_file(folder.path / file))
    own = dict(model.state_dict())
    with torch.no_grad():
        for name, p in own.items():
            if name in found:
                part = _part_like(p, found[name].to(p.dtype))
                (p.to_local() if isinstance(p, DTensor) else p).copy_(
                    part.to_local() if isinstance(part, DTensor) else part
                )

    class R:
        missing = ()
        unexpected = ()
        newly_initialised = ()
        tied = ()
        bytes_requested = 0

    return R()
