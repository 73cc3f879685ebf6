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
    opening, before save the list as it was, and the     judges again, by the same
                         record of its session
    opening, lost saved  snapshots that are lost, with   takes both from them
                         bits and temp data
    opening, after save  the verdict, and a session      the image must look as in the
                         that the record is not of       list: nothing was written since

What is lost by the verdict of a mount is saved before anything that it was judged by
changes, bits included.  What the next mount will judge by is in the list, too, which
is replaced in one step and durable before the record of activity is begun anew.  So
a mount that dies at any moment leaves either all of the evidence, or its verdict.

What was only held is gone after a reboot (another boot id), and when a file system
that holds image, state or temp images is another one than it was, though there was
no reboot: unmounted, or gone, and back (filesystems.py).  Where that cannot be known
it counts as gone.  Then nothing mapped is trusted unless it was made durable step
by step (durability=power, durability.py): snapshots are lost.  They are all lost,
too, if write-back has failed since the daemon died, which the file systems are asked,
and if image or state directory are copies of what was not unmounted in order, whatever
the durability: files that are copied one after the other, perhaps while a daemon still
changed them, are not of one moment, and no record in them can tell.  Those that need
the image are if somebody else wrote it, or if nobody can know (activity.py).  Dirty
bitmaps are inconsistent in all these cases.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from attrs import define, field

from ..engine.geometry import Geometry
from ..engine.layer import Layer
from ..engine.layers import LayerStack
from ..storage import filesystems
from ..storage.image import FileImage
from .activity import Activity
from .layerstore import LayerDirectory
from .manifest import MAX_NUMBER, ImageStamp, Manifest

ORIGINALS = {"image": "the image", "state": "the state directory"}


def boot_id() -> str:
    """Identifies this boot of the kernel (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def new_session() -> int:
    """A number for a mount that no other has had."""
    return secrets.randbelow(MAX_NUMBER - 1) + 1


def holders(image: int, state: int, temps: Mapping[str, int]) -> dict[str, str]:
    """What file systems hold these, by place; for `Manifest.held_by`.  Blocks.

    Image and state are descriptors, `temps` those of the directories outside of the
    state directory.  "" for what cannot be identified, or judged at all.  And which files
    image and state are: what a rename keeps and a copy does not.
    """
    found = {"image": image, "state": state, **{f"temp {path}": fd for path, fd in temps.items()}}
    systems = {
        place: filesystems.identity_of(fd)
        if place.startswith("temp ") or filesystems.kind_of(fd) in filesystems.KNOWN
        else ""
        for place, fd in found.items()
    }
    return systems | {f"{place} file": str(os.fstat(found[place]).st_ino) for place in ORIGINALS}


def gone(known: Manifest, now: Mapping[str, str]) -> str | None:
    """Why what an unclean mount only held is not there any more; None: it is."""
    if known.boot_id != boot_id():
        return "the machine went down without unmounting"
    if not known.held_by:
        return "an older version of snapfs left it without unmounting"
    places = dict(ORIGINALS)
    places |= {f"temp {layer.temp_dir}": "a temp image" for layer in known.layers if layer.temp_dir}
    for place, what in places.items():
        identity = known.held_by.get(place)
        if not identity or not now.get(place):
            return (
                f"the daemon died, and whether the file system of {what} still has all that "
                "it was given cannot be known for one of its kind"
            )
        if identity != now[place]:
            return (
                f"the daemon died, and the file system of {what} is not the one that it had "
                "then: it was mounted anew, or the file was moved to another"
            )
    return None


def copied(known: Manifest, now: Mapping[str, str]) -> str | None:
    """Why what an unclean mount left may not be of one moment; None: it is the original."""
    for place, what in ORIGINALS.items():
        number = known.held_by.get(f"{place} file")
        if number is not None and number != now[f"{place} file"]:
            return (
                f"{what} is a copy, made before the mount was ended in order, and nothing tells "
                "whether all of it is of one moment"
            )
    return None


def ask_for_errors(
    known: Manifest, now: Mapping[str, str], descriptors: Iterable[int], activity: Activity
) -> None:
    """Find out whether write-back has failed since an unclean mount, and note it.  Blocks.

    That a file system tells once, so it is noted at once, for whoever must judge again.
    """
    if known.clean or not (known.layers or known.bitmaps) or gone(known, now) is not None:
        return
    asked = set()
    for fd in descriptors:
        device = os.fstat(fd).st_dev
        if device not in asked:
            asked.add(device)
            error = filesystems.ask_for_errors(fd)
            if error is not None:
                activity.fail(error.errno or errno.EIO)


def distrust(
    known: Manifest, stamp: ImageStamp, activity: Activity, now: Mapping[str, str]
) -> tuple[str | None, bool]:
    """Why what is mapped does not tell of the image as it is, if so; and is it all wrong?

    `stamp`: of the image now; `now`: its `holders`.  Raises StateError if `activity` is
    needed and no record.
    """
    if not known.layers and not known.bitmaps:
        return None, False
    if known.clean:
        change = stamp.change_since(known.image)
        return change and f"the image was changed while it was not mounted: {change}", False
    lost, copy = gone(known, now), copied(known, now)
    durable = known.durability == "power" and all(known.held_by.get(each) for each in ORIGINALS)
    if lost is not None and not durable:
        return lost, True
    if copy is not None:
        return copy, True
    if lost is not None:
        rebooted = known.boot_id != boot_id()
        change = activity.change_since_sync(known.session, known.image, stamp, rebooted=rebooted)
        return change and f"{lost}, and the image may have been changed since: {change}", False
    failed = activity.failed()
    if failed:
        return (
            "the daemon died, and a file system that holds image, state or temp images could "
            f"not store all that it was given: {os.strerror(failed)}"
        ), True
    change = activity.change_since(known.session, known.image, stamp)
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
    known: Manifest,
    stamp: ImageStamp,
    files: LayerDirectory,
    activity: Activity,
    now: Mapping[str, str],
    save: Callable[[list[Layer]], None],
) -> Recovered:
    """Load the layers of a manifest.  `stamp`: of the image now; `now`: its holders.  Blocks.

    `save` makes what is lost durable, and changes nothing of what it was judged by: access
    and done bits are a part of that, so they change only afterwards.

    Raises StateError and OSError; `files` then closes what was opened.
    """
    found = Recovered()
    for record in known.layers:
        layer = files.load(record, known.cluster_size)
        if layer is not None:
            found.layers.append(layer)
    stack = LayerStack(found.layers, Geometry(stamp.size, known.cluster_size).clusters)
    found.distrust, wrong = distrust(known, stamp, activity, now)
    if found.distrust is not None:
        _mark_lost(found, stack, found.distrust, wrong)
        if found.notices:
            save(found.layers)
    for layer in found.layers:
        if not layer.live or layer.state == "lost":
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
        needs_it = wrong or layer.id in need_image
        if layer.live and needs_it and layer.state != "lost":
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
