"""What a mount makes of the state directory that another one left.

When the daemon dies (the page cache survives it, so every write
that returned is there), and what the next mount does:

    died in             finds                            does
    create, before save files of an id not in the list   removes them
    create, in between  a nameless layer                 drops what nobody needs
    create, after save  the snapshot                     keeps it
    copy, before done   temp data without a done bit     punches it out
    copy, after done    done bit, image not written      keeps it: same bytes
    write               image in part new, done set      keeps it
    losing clusters     more lost than inaccessible  keeps both: incomplete
    discard             access clear, done still set     clears done, punches
    delete, before save the snapshot                     keeps it
    delete, after save  a nameless layer                 drops what nobody needs
    delete, at the end  files of an id not in the list   removes them
    replacing manifest  manifest.json.new                overwrites it later
    bitmap, before save the bitmaps as they were, and    keeps them: with all bits;
                        files of ids not in the list     removes those
    bitmap, after save  the new bitmaps, and the files   keeps them, removes those
                        of those that they replaced
    write, bits set     dirty bits, image not written    keeps them: some too many
    close, before save  clean=false, same boot           as after a death

After an unclean reboot (another boot id) nothing mapped is trusted unless it
was made durable step by step (durability=power, durability.py): snapshots are
lost.  So are those that need the image when somebody else wrote it.  Dirty
bitmaps are inconsistent in both cases.
"""

from __future__ import annotations

from pathlib import Path

from attrs import define, field

from ..engine.geometry import Geometry
from ..engine.layer import Layer
from ..engine.layers import LayerStack
from ..storage.image import FileImage
from .activity import Activity
from .layerstore import LayerDirectory
from .manifest import ImageStamp, Manifest


def boot_id() -> str:
    """Identifies this boot of the kernel (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def distrust(known: Manifest, stamp: ImageStamp, activity: Activity) -> tuple[str | None, bool]:
    """Why what is mapped does not tell of the image as it is, if so; and is it all wrong?

    `stamp`: of the image now.  Raises StateError if `activity` is needed and no record.
    """
    if not known.layers and not known.bitmaps:
        return None, False
    rebooted = not known.clean and known.boot_id != boot_id()
    if rebooted and known.durability != "power":
        return "the machine went down without unmounting", True
    if known.clean:
        change = stamp.change_since(known.image)
    elif rebooted:
        change = activity.change_since_boot(known.image, stamp)
    else:
        change = activity.change_since(known.image, stamp)
    return change and f"the image was changed while it was not mounted: {change}", False


@define
class Recovered:
    """Layers between two transitions.

    `gone`: numbers of those whose files go once a list without them is saved.
    `distrust`: why what is mapped does not tell of the image as it is, if so.
    `notices` say what was done, a line each.
    """

    layers: list[Layer] = field(factory=list)
    gone: list[int] = field(factory=list)
    distrust: str | None = None
    notices: list[str] = field(factory=list)


def recover(
    known: Manifest, stamp: ImageStamp, files: LayerDirectory, activity: Activity
) -> Recovered:
    """Load the layers of a manifest.  `stamp`: of the image now.  Blocks.

    Raises StateError and OSError; `files` then closes what was opened.
    """
    found = Recovered()
    for record in known.layers:
        layer = files.load(record, known.cluster_size)
        if layer is not None:
            found.layers.append(layer)
    stack = LayerStack(found.layers, Geometry(stamp.size, known.cluster_size).clusters)
    found.distrust, wrong = distrust(known, stamp, activity)
    if found.distrust is not None:
        _mark_lost(found, stack, found.distrust, wrong)
    for layer in found.layers:
        if not layer.live:
            layer.withdraw(0, layer.geometry.clusters)
    stack.settle(0, stack.clusters)
    for layer in list(found.layers):
        if not layer.live and layer.is_empty():
            found.layers.remove(layer)
            layer.temp.close()
            found.gone.append(layer.id)
        else:
            _punch_undone(found, layer)
    return found


def _mark_lost(found: Recovered, stack: LayerStack, reason: str, wrong: bool) -> None:
    """The snapshots that need the image are lost, or all if what is mapped is `wrong`."""
    need_image = {layer.id for layer, _ in stack.needing(0, stack.clusters)}
    for layer in found.layers:
        if layer.live and (wrong or layer.id in need_image):
            layer.withdraw(0, layer.geometry.clusters)
            if layer.state != "lost":
                layer.degrade("lost", reason)
                found.notices.append(f"snapshot {layer.name!r} is lost: {reason}")


def _punch_undone(found: Recovered, layer: Layer) -> None:
    """Free temp data without a done bit; what cannot be freed costs space only."""
    assert isinstance(layer.temp, FileImage)
    try:
        for first, stop in layer.done.runs(0, len(layer.done), False):
            layer.temp.punch_data(*layer.geometry.whole(first, stop))
    except OSError as error:
        found.notices.append(f"cannot free space in a temp image: {error.strerror}")
