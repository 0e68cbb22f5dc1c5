"""Components: how much of a model is the same as in another one, counted from below, layer by layer.

A model with a stack of layers has a *chain*: ``chain[k]`` is the digest of all that the output of its first ``k`` layers depends
on beside the row that is read. Two models whose chains agree at ``k`` have the same hidden state there, bit for bit, for the same
batch; what they do from there on is their own. Made of a `Manifest` and of the order in which a live forward used its parts.

The rest of a model counts where it was first used: an embedding before the first layer, a head after the last one. What a forward
was not seen to use counts as used before everything. So does the code of every module, wherever it stands, and each config:
what is said of positions holds for tensors alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from evalcache.canonical import digest_canonical
from evalcache.digest import Digest
from evalcache.manifest import Manifest, ModuleRecord
from evalcache.structs import Frozen, field

_FORMAT = "evalcache chain 1"


class Stack(Frozen):
    """Where the layers of a model are, and when one forward used the rest of it.

    Args:
        path: of the list that holds the layers; they were called once each, in their order.
        count: of the layers.
        used: path of a module outside of the layers → how many layers had ended when it, or a tensor of its own, was first used.
        early: number of a layer → the same, for layers of which a tensor was used before they were called.
    """

    path: str
    count: int
    used: Mapping[str, int] = field(default_factory=dict)
    early: Mapping[int, int] = field(default_factory=dict)

    def layer(self, number: int) -> str:
        """Path of a layer."""
        return f"{self.path}.{number}" if self.path else str(number)


def chain(manifest: Manifest, stack: Stack) -> tuple[Digest, ...]:
    """``stack.count + 1`` digests: of what all layers have below them, then of what leaves each layer.

    Raises:
        KeyError: the manifest is of a model without these layers.
    """
    layers = [manifest.modules[stack.layer(number)].digest for number in range(stack.count)]
    inside = tuple(f"{stack.layer(number)}." for number in range(stack.count))
    whole = {stack.layer(number) for number in range(stack.count)}
    shapes, tensors = [], [[] for _ in range(stack.count + 1)]
    for path, module in manifest.modules.items():
        if path in whole or path.startswith(inside):
            continue
        shapes.append([path, *made_of(module)])
        tensors[stack.used.get(path, 0)].append([path, [[name, one.digest.value] for name, one in module.tensors.items()]])
    for number, position in sorted(stack.early.items()):
        tensors[position].append([stack.layer(number), layers[number].value])
    configs = {path: digest.value for path, digest in manifest.configs.items()}
    referred = [[path, manifest.modules[path].digest.value] for path in manifest.about.get("references", ())]
    digests = [digest_canonical([_FORMAT, stack.path, stack.count, configs, shapes, referred, tensors[0]])]
    for number, layer in enumerate(layers):
        between = tensors[number] if number else []
        digests.append(digest_canonical([digests[-1].value, layer.value, between]))
    return tuple(digests)


def shared_depth(mine: Sequence[Digest], others: Sequence[Digest]) -> int:
    """After how many layers two models are still the same; -1 where they differ before the first one."""
    depth = -1
    for one, other in zip(mine, others, strict=False):
        if one != other:
            break
        depth += 1
    return depth


def made_of(module: ModuleRecord) -> list[object]:
    """What a module is beside the bytes of its tensors, as a canonical value."""
    shapes = [[name, tensor.dtype, list(tensor.shape)] for name, tensor in module.tensors.items()]
    return [module.class_name, shapes, {kind: digest.value for kind, digest in module.parts.items()}]
